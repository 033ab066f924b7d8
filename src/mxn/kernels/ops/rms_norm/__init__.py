"""The op `rms_norm`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="rms_norm",
    signature=("rms_norm(x[..., D], weight_D, eps) -> like x"),
    meaning=(
        "Root-mean-square norm over the last dim, float32 inside. A float32 weight multiplies "
        "before rounding to x's dtype, a weight of x's dtype after it."
    ),
)
