"""The op `add_rms_norm`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="add_rms_norm",
    signature=(
        "add_rms_norm(x[..., D], residual[..., D], weight_D, eps) -> (normed, x + residual)"
    ),
    meaning=("Adds the residual, then norms the sum as `rms_norm` does."),
)
