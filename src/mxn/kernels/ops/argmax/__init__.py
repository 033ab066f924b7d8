"""The op `argmax`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="argmax",
    signature="argmax(logits_RV) -> ids_R int64",
    meaning=(
        "The first of the largest values of each row; -1 where the largest is no finite number or "
        "the row holds a NaN."
    ),
)
