"""The op `sample`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="sample",
    signature=("sample(logits_RV, uniform_R) -> ids_R int64"),
    meaning=(
        "Inverse of the cumulative distribution of softmax(logits), in token order; uniform_R "
        "in [0, 1). A row depends on nothing but itself. A row that holds NaN, or nothing "
        "above -inf, gives -1."
    ),
)
