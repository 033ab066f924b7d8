"""The op `pool`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="pool",
    signature=("pool(x_BLD, lengths_B, kind) -> [B, D]"),
    meaning=(
        "One vector for each sequence: its first row (cls), the mean of its rows, or its last row."
    ),
)
