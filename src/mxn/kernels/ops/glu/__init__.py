"""The op `glu`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="glu",
    signature=("glu(x[..., 2F], activation) -> [..., F]"),
    meaning=("act(first half) * second half."),
)
