"""The op `filter_logits`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="filter_logits",
    signature=(
        "filter_logits(logits_RV, temperature_R, top_k_R | None, top_p_R | None, "
        "min_p_R | None, num_candidates=None) -> (kept_RC, ids_RC int64, is_exact_R bool)"
    ),
    meaning=(
        "logits / temperature of C candidates in token order, with -inf for what top-k, top-p and "
        "min-p refuse, in this order. Ties with the last kept value are kept, so the result does "
        "not depend on a sort's order. top_k 0, top_p 1, min_p 0, or None for all rows: off. "
        "Without num_candidates C is V. With it, is_exact_R says for which rows the candidates "
        "hold all that is kept; the other rows mean nothing."
    ),
)
