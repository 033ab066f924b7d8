"""The op `dense_attention`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="dense_attention",
    signature=("dense_attention(q_BNLH, k_BNLH, v_BNLH, lengths_B, scale) -> [B, N, L, H]"),
    meaning=(
        "Bidirectional attention with padding behind lengths_B. Rows behind a length are "
        "finite and mean nothing."
    ),
)
