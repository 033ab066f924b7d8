"""`kv_write` in torch, for any device."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("kv_write", name="torch")
def kv_write(
    k_TGH: Tensor, v_TGJ: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots_T: Tensor
) -> None:
    _write(k_TGH, k_cache, slots_T)
    if v_TGJ is not None and v_cache is not None:
        _write(v_TGJ, v_cache, slots_T)


def _write(rows: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    # view, not flatten: a cache that cannot be viewed would be written as a copy and lost.
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots_T, rows.to(cache.dtype))
