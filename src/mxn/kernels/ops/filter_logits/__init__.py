"""The op `filter_logits`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="filter_logits",
    signature=(
        "filter_logits(logits_RV, temperature_R, top_k_R | None, top_p_R | None, "
        "min_p_R | None, num_candidates=None) -> (logits_RV, is_exact_R)"
    ),
    meaning=(
        "logits / temperature with -inf for what top-k, top-p and min-p refuse, in this order. "
        "Ties with the last kept value are kept, so the result does not depend on a sort's order. "
        "top_k 0, top_p 1, min_p 0, or None for all rows: off. With num_candidates a row may stay "
        "undecided: is_exact_R says so."
    ),
)
