"""The op `moe`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="moe",
    signature=("moe(x_TD, weights_Tk, ids_Tk, gate_up_EFD, down_EDI, activation) -> [T, D]"),
    meaning=(
        "Weighted sum of gated feed-forward experts; gate_up holds the gate's rows, then up's "
        "(F = 2 I)."
    ),
)
