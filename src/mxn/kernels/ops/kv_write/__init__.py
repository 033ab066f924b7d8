"""The op `kv_write`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="kv_write",
    signature=("kv_write(k_TGH, v_TGJ | None, k_cache, v_cache | None, slots_T) -> None"),
    meaning=("Stores row t at slot page * page_tokens + offset; other slots keep their bytes."),
)
