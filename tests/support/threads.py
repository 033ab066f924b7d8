"""A team of tensor parallelism whose ranks are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

WAIT_S = 60.0


class ThreadTeam:
    """One thread's view; implements `net.shard.Team`. `num_sums` counts what it added."""

    def __init__(self, index: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.index, self.size = index, size
        self._barrier, self._box = barrier, box
        self.num_sums = 0

    def add(self, tensor: Tensor) -> None:
        parts = self.gather(tensor.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        tensor.copy_(total)
        self.num_sums += 1

    def gather(self, part: Tensor) -> list[Tensor]:
        assert part.is_contiguous()
        self._box[self.index] = part
        self._barrier.wait(WAIT_S)
        parts = list(self._box)
        self._barrier.wait(WAIT_S)
        return parts


def run_team(size: int, run: Callable[[ThreadTeam], Any]) -> list[Any]:
    """Return what `run` returned for each member of a team."""
    barrier, box = threading.Barrier(size), [None] * size

    def guarded(index: int) -> Any:
        try:
            return run(ThreadTeam(index, size, barrier, box))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [task.result() for task in [pool.submit(guarded, i) for i in range(size)]]
