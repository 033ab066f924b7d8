"""Memory for weights and caches: aligned, and on large pages where the system has them."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def lazy_zeros(num_bytes: int) -> Tensor:
    """Return uint8 zeros that take no memory until they are written, on large pages if possible."""
    import torch

    area = mmap.mmap(-1, max(num_bytes, 1))
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        area.madvise(advice)
    return torch.frombuffer(area, dtype=torch.uint8, count=num_bytes)
