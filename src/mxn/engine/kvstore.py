"""The tensors of the paged cache, and how many pages fit.

Knows shapes, bytes and devices; which page belongs to whom is the page table's business.
Start at `plan_pages`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxn.errors import CapacityError
from mxn.models.base import LayerCache, OwnsCache
from mxn.units import format_bytes

if TYPE_CHECKING:
    import torch

    from mxn.models.base import CausalLM
    from mxn.models.spec import KvShape


_ALIGN = 64  # a cache line, and the widest vector of any CPU


def page_bytes(model: CausalLM, page_tokens: int) -> int:
    """Return the bytes of one page over all layers of `model`."""
    if isinstance(model, OwnsCache):
        return model.page_bytes(page_tokens)
    numbers = sum(shape.num_heads * (shape.k_dim + shape.v_dim) for shape in model.kv_shapes)
    return numbers * page_tokens * model.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """How large the pool is and what set its size; printed by `mxn doctor` and at load."""

    num_pages: int
    page_bytes: int
    limited_by: str  # "demand": max_sequences × max_context; "memory"; "kv_bytes"

    @property
    def total_bytes(self) -> int:
        return self.num_pages * self.page_bytes


def plan_pages(
    *,
    page_bytes: int,
    page_tokens: int,
    max_sequences: int,
    max_context: int,
    available_bytes: int | None,
    is_given: bool = False,
    device: str = "device",
) -> PagePlan:
    """Return how many pages to allocate: what can be used, cut to what there is memory for.

    `available_bytes` is what the pool may take; `is_given` says that the user set it. None means
    that the device does not tell, and then demand alone decides.
    Raises: CapacityError when not even one sequence of `max_context` tokens fits.
    """
    pages_one = -(-max_context // page_tokens)
    demand = pages_one * max_sequences
    if available_bytes is None:
        return PagePlan(num_pages=demand, page_bytes=page_bytes, limited_by="demand")
    fits = available_bytes // page_bytes
    if fits < pages_one:
        tokens = fits * page_tokens
        raise CapacityError(
            f"a context of {max_context} tokens needs {format_bytes(pages_one * page_bytes)} of "
            f"cache, {device!r} has {format_bytes(available_bytes)} for it",
            hint=f"--max-context {tokens} fits" if tokens else "use a smaller model or free memory",
        )
    if demand <= fits:
        return PagePlan(num_pages=demand, page_bytes=page_bytes, limited_by="demand")
    limited_by = "kv_bytes" if is_given else "memory"
    return PagePlan(num_pages=fits, page_bytes=page_bytes, limited_by=limited_by)


def allocate(model: CausalLM, *, num_pages: int, page_tokens: int) -> list[LayerCache]:
    """Return the zeroed cache of each layer, shaped as `LayerCache` says or as the model wants it.

    Zeroed, not empty: a masked position is multiplied by an exact 0, and 0 × NaN would be NaN.
    Raises: CapacityError when the device refuses.
    """
    import torch

    dtype, device = model.dtype, model.device

    def tensor(shape: KvShape, dim: int) -> torch.Tensor:
        size = (num_pages, page_tokens, shape.num_heads, dim)
        if device.type == "cpu":
            return _lazy_zeros(size, dtype)
        return torch.zeros(size, dtype=dtype, device=device)

    try:
        if isinstance(model, OwnsCache):
            return model.make_cache(num_pages, page_tokens)
        return [
            LayerCache(
                tensor(shape, shape.k_dim), tensor(shape, shape.v_dim) if shape.v_dim else None
            )
            for shape in model.kv_shapes
        ]
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        wanted = num_pages * page_bytes(model, page_tokens)
        raise CapacityError(
            f"{device} refused {format_bytes(wanted)} for the cache: {str(error).splitlines()[0]}",
            hint="set a smaller --kv-memory or --max-context",
        ) from error


def _lazy_zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in main memory that costs nothing until it is written.

    numpy asks the operating system for zeroed pages, torch.zeros writes them: the pool would take
    its whole size at once, on a machine that others use too.
    """
    import numpy as np
    import torch

    num_bytes = math.prod(size) * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGN, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(size)
