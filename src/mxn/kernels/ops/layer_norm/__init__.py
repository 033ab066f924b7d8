"""The op `layer_norm`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="layer_norm",
    signature=("layer_norm(x[..., D], weight_D, bias_D, eps) -> like x"),
    meaning=(
        "Mean and variance norm over the last dim, float32 inside. weight and bias may be None."
    ),
)
