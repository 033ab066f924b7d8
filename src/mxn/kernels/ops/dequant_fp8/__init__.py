"""The op `dequant_fp8`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="dequant_fp8",
    signature=("dequant_fp8(weight_FD e4m3, scale_inv, block, dtype) -> [F, D]"),
    meaning=("Weight times the scale of its block [b0, b1]; the last blocks may be ragged."),
)
