"""How many micro-batches each pipeline does, and which set of pipelines does all of them soonest.

Knows pipelines as lines: `start_s` + n·`each_s` seconds for n micro-batches. Start at `split`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.errors import UserError


@dataclass(frozen=True, slots=True)
class Pace:
    """A pipeline's time for n ≥ 1 micro-batches: `start_s` + n·`each_s`."""

    start_s: float
    each_s: float

    def time_s(self, micro_batches: int) -> float:
        return self.start_s + micro_batches * self.each_s

    def done_in(self, seconds: float) -> int:
        """Return how many micro-batches it does in `seconds`."""
        return max(0, math.floor((seconds - self.start_s) / self.each_s + 1e-9))


def split(paces: Sequence[Pace], micro_batches: int) -> list[int]:
    """Return the micro-batches of each pipeline so that the last one ends as early as possible.

    Each next one goes to the pipeline that would end first with it, which is optimal because time
    grows with the count. A pipeline may get none: then it is better left out.
    Raises: UserError when there is no pipeline.
    """
    if not paces:
        raise UserError("no pipeline to give micro-batches to")
    shares = _bulk(paces, micro_batches)
    queue = [(pace.time_s(n + 1), i) for i, (pace, n) in enumerate(zip(paces, shares, strict=True))]
    heapq.heapify(queue)
    for _ in range(micro_batches - sum(shares)):
        _, i = heapq.heappop(queue)
        shares[i] += 1
        heapq.heappush(queue, (paces[i].time_s(shares[i] + 1), i))
    return shares


def finish_s(paces: Sequence[Pace], shares: Sequence[int]) -> float:
    """Return when the last pipeline that works ends."""
    return max(pace.time_s(n) for pace, n in zip(paces, shares, strict=True) if n)


def _bulk(paces: Sequence[Pace], micro_batches: int) -> list[int]:
    """Return shares that the one-by-one rule would pass through, nearly all of the way.

    What all pipelines do within a time that is too short for everything is a prefix of the rule.
    """
    low, high = 0.0, max(pace.time_s(micro_batches) for pace in paces)
    shares = [0] * len(paces)
    for _ in range(60):
        middle = (low + high) / 2
        done = [pace.done_in(middle) for pace in paces]
        if sum(done) > micro_batches:
            high = middle
        else:
            low, shares = middle, done
            if micro_batches - sum(done) <= len(paces):
                break
    return shares
