"""The op `activation`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="activation",
    signature=("activation(x, kind) -> like x"),
    meaning=("silu, gelu, gelu_tanh or relu."),
)
