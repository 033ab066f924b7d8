"""Which set of pipelines does all micro-batches soonest with the slots there are.

Knows options (slots they take, paces they can run at) and counts; knows nothing of layers or links.
Start at `pack`, which is exact; `soonest` judges a given set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxn.train.plan.search.cuts import Counts
from mxn.train.plan.search.shares import Pace


@dataclass(frozen=True, slots=True)
class Option:
    """A pipeline that could be: the slots that it takes and the paces that it can run at."""

    slots: Counts
    paces: tuple[Pace, ...]

    def done_in(self, seconds: float) -> int:
        return max(pace.done_in(seconds) for pace in self.paces)


def soonest(sets: Sequence[tuple[Sequence[Pace], int]], micro_batches: int) -> float:
    """Return when pipelines with these paces, so many of each, can have done all micro-batches."""

    def done(seconds: float) -> int:
        return sum(count * max(p.done_in(seconds) for p in paces) for paces, count in sets)

    return _first(
        done, _longest([p for paces, _ in sets for p in paces], micro_batches), micro_batches
    )


def pack(
    num_slots: Counts,
    options: Sequence[Option],
    micro_batches: int,
    *,
    worth_s: float = float("inf"),
) -> tuple[float, list[int]]:
    """Return the least time and how often each option is used in it.

    Infinite and nothing when there is no option, or nothing that ends within `worth_s`.


    Exact: for each time that is tried, a knapsack over the slots says how many micro-batches could
    be done. Work and memory grow with the product of `num_slots` + 1.
    """
    if not options:
        return float("inf"), []
    top = _longest([pace for option in options for pace in option.paces], micro_batches)

    def done(seconds: float) -> int:
        return int(_most(num_slots, options, seconds)[0].reshape(-1)[-1])

    if worth_s < top:
        if done(worth_s) < micro_batches:
            return float("inf"), []
        top = worth_s
    seconds = _first(done, top, micro_batches)
    return seconds, _chosen(num_slots, options, seconds)


def _longest(paces: Sequence[Pace], micro_batches: int) -> float:
    return min(pace.time_s(micro_batches) for pace in paces)


def _first(done, top: float, micro_batches: int) -> float:
    """Return the first time, to six digits, at which `done` reaches all micro-batches."""
    low, high = 0.0, top * (1 + 1e-9)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if done(middle) >= micro_batches:
            high = middle
        else:
            low = middle
    return high


def _most(
    num_slots: Counts, options: Sequence[Option], seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return how much can be done by slots used, and the last option that improved it."""
    most = np.zeros([n + 1 for n in num_slots], dtype=np.int64)
    last = np.full(most.shape, -1)
    for number, option in enumerate(options):
        gain = option.done_in(seconds)
        if gain == 0:
            continue
        target = tuple(slice(take, None) for take in option.slots)
        source = tuple(
            slice(None, n + 1 - take) for n, take in zip(num_slots, option.slots, strict=True)
        )
        times = min(n // take for n, take in zip(num_slots, option.slots, strict=True) if take)
        for _ in range(times):
            better = most[source] + gain > most[target]
            if not better.any():
                break
            most[target] = np.where(better, most[source] + gain, most[target])
            last[target] = np.where(better, number, last[target])
    return most, last


def _chosen(num_slots: Counts, options: Sequence[Option], seconds: float) -> list[int]:
    _, last = _most(num_slots, options, seconds)
    used = [0] * len(options)
    at = np.array(num_slots)
    while last[tuple(at)] >= 0:
        number = int(last[tuple(at)])
        used[number] += 1
        at = at - np.array(options[number].slots)
    return used
