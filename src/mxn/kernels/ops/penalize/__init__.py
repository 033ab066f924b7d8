"""The op `penalize`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="penalize",
    signature=(
        "penalize(logits_RV, rows_M, ids_M, repetition_M, subtract_M) -> logits_RV, in place"
    ),
    meaning=(
        "For each pair (row, token): divide a positive logit by repetition, multiply another "
        "by it; then subtract. A pair may occur once."
    ),
)
