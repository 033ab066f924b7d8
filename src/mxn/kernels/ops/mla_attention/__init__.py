"""The op `mla_attention`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="mla_attention",
    signature=("mla_attention(q_TNC, cache, batch, scale, v_dim) -> [T, N, v_dim]"),
    meaning=(
        "Causal attention over latent rows [num_pages, K, 1, C]: keys are the rows, values "
        "their first v_dim dims."
    ),
)
