"""The truth of `kv_write`."""

from __future__ import annotations

from torch import Tensor


def kv_write(
    k_TGH: Tensor, v_TGJ: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots_T: Tensor
) -> None:
    page_tokens = k_cache.shape[1]
    for t, slot in enumerate(slots_T.tolist()):
        page, offset = divmod(slot, page_tokens)
        k_cache[page, offset] = k_TGH[t].to(k_cache.dtype)
        if v_TGJ is not None and v_cache is not None:
            v_cache[page, offset] = v_TGJ[t].to(v_cache.dtype)
