"""The op `rope`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="rope",
    signature=("rope(q_TNH, k_TGH, cos_TR, sin_TR, is_interleaved=False) -> (q, k)"),
    meaning=(
        "Rotates the first 2R dims of each head, passes the rest through; cos and sin are "
        "float32 and the products are taken in float32."
    ),
)
