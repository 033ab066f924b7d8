"""The op `token_logprobs`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="token_logprobs",
    signature=("token_logprobs(logits_RV, ids_R, num_top) -> (chosen_R, top_Rn, top_ids_Rn)"),
    meaning=(
        "float32 log-softmax at ids_R and its num_top best; both are read from the same floats."
    ),
)
