"""The op `l2_normalize`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="l2_normalize",
    signature=("l2_normalize(x[..., D]) -> like x"),
    meaning=("x divided by its Euclidean length, which is taken as at least 1e-12."),
)
