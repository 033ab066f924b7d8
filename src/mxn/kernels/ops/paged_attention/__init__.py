"""The op `paged_attention`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="paged_attention",
    signature=(
        "paged_attention(q_TNH, k_cache, v_cache, batch, scale, window=None, softcap=None) -> "
        "[T, N, J]"
    ),
    meaning=(
        "Causal attention of each sequence's new tokens over its pages; prefill chunks and "
        "decode rows mixed. Slots outside the context are never read into a result, whatever "
        "they hold."
    ),
)
