"""The op `softcap`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="softcap",
    signature=("softcap(x, cap) -> like x"),
    meaning=("cap * tanh(x / cap)."),
)
