"""The op `linear`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="linear",
    signature=("linear(weight_FD, bias_F=None) -> callable: x[..., D] -> y[..., F]"),
    meaning=("Matrix product with a weight that is prepared once."),
    is_prepared=True,
)
