"""Memory of packed weights: parts that threads ask for at once, and systems without large pages."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path

import pytest
import torch

from mxn.errors import UnsupportedError
from mxn.kernels.native import formats, library, memory, missing_reason
from mxn.kernels.native.pack import pack
from mxn.models.native.stored import pack_stored
from mxn.models.quantized.matrix import QuantizedMatrix

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


def test_threads_never_get_the_same_part():
    arena, found = memory.Arena(), [[], []]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def take(mine: list[torch.Tensor]) -> None:
        mine.extend(arena.empty(64) for _ in range(5000))

    try:
        threads = [threading.Thread(target=take, args=(mine,)) for mine in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    starts = {part.data_ptr() for mine in found for part in mine}
    assert len(starts) == 10000


def test_a_system_without_large_pages_gives_small_ones(monkeypatch):
    class Small(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Small)
    assert memory.lazy_zeros(5000).tolist() == [0] * 5000


def test_rows_whose_sums_leave_32_bits_are_refused():
    assert pack(torch.ones(1, 132_000), formats.INT8).in_features == 132_000
    with pytest.raises(UnsupportedError, match=r"140000 columns.* up to 132104"):
        pack(torch.ones(1, 140_000), formats.INT8)
    pack(torch.ones(1, 140_000), formats.parse_weights("int8-g128"))


def test_stored_rows_with_a_minimum_may_be_half_as_long():
    def stored(width: int) -> QuantizedMatrix:
        return QuantizedMatrix(
            values=torch.zeros(1, width, dtype=torch.uint8), scales=torch.ones(1, 1),
            zeros=torch.full((1, 1), 100.0), bits=8, group=width,
        )  # fmt: skip

    pack_stored(stored(66_000))
    with pytest.raises(UnsupportedError, match=r"70000 columns.* up to 66311"):
        pack_stored(stored(70_000))


def test_too_many_query_rows_are_refused_with_the_limit():
    lib = library()
    with pytest.raises(ValueError, match="17 query rows, at most 16"):
        lib.attend(lib.CacheShape(), 0, 0, 0, 17, 0, 0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0, 0, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_zeros_are_private_memory():
    """Shared memory, which is Python's default, gets no large pages."""
    area = memory.lazy_zeros(8 << 20)
    start = area.data_ptr()
    line = next(
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= start < int(line.split("-")[1].split()[0], 16)
    )
    assert line.split()[1][3] == "p"
