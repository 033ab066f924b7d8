"""Memory for weights and caches: aligned, and on large pages where the system has them.

A product that streams weights reads a new small page every 4 KiB; with pages of 2 MiB the processor
looks up far fewer addresses. Start at `Arena`.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ALIGN = 64  # a cache line, and the widest vector
_LARGE_PAGE = 2 << 20
_CHUNK = 64 << 20


def lazy_zeros(num_bytes: int) -> Tensor:
    """Return uint8 zeros that take no memory until they are written, on large pages if possible."""
    import torch

    size = -(-max(num_bytes, 1) // _LARGE_PAGE) * _LARGE_PAGE
    # Python's default is shared memory, for which most systems have no large pages.
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # EINVAL: a system without large pages; small ones serve
            area.madvise(advice)
    return torch.frombuffer(area, dtype=torch.uint8, count=num_bytes)


class Arena:
    """Hands out parts of large areas; nothing is given back before all tensors of an area are.

    Threads may share one: models are also packed beside a running one.
    """

    def __init__(self) -> None:
        self._area: Tensor | None = None
        self._used = 0
        self._lock = threading.Lock()

    def empty(self, num_bytes: int) -> Tensor:
        """Return `num_bytes` of uint8, aligned to a cache line, with any content."""
        with self._lock:
            start = -(-self._used // _ALIGN) * _ALIGN
            if self._area is None or start + num_bytes > len(self._area):
                self._area, start = lazy_zeros(max(_CHUNK, num_bytes)), 0
            self._used = start + num_bytes
            return self._area[start : start + num_bytes]
