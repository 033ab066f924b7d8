"""Where to cut the row of layers, and which chip stands where: exact dynamic programs.

Knows tables of seconds; knows nothing of groups, links, memory or plans, all of which went into
the tables. A cut is judged by two numbers, the sum over its stages and the slowest of them: under
1F1B m micro-batches take sum + (m - 1)·slowest. No cut that is worse in both is ever returned.
Start at `best_in_order` for a given row of chips, at `fronts` when the order is free too.

Tables: `busy[a, e]` are the seconds of a micro-batch through layers a … e - 1 on one kind of slot,
infinite where they do not fit; `hop[e]` those of handing over in front of layer e, both ways.
Positions are counted from the last stage, since 1F1B keeps p + 1 micro-batches at position p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Counts = tuple[int, ...]
"""How many slots of each kind."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages in order: the kind of slot of each, and its first layer (then the end)."""

    kinds: tuple[int, ...]
    bounds: tuple[int, ...]
    sum_s: float
    max_s: float

    def time_s(self, micro_batches: int) -> float:
        return self.sum_s + (micro_batches - 1) * self.max_s


def slowest_in_order(steps: Sequence[Table], last: Table) -> float:
    """Return the least slowest stage of any cut in this order; infinite if none fits.

    `steps` are the tables of all stages but the last, with their hops added.
    """
    rest = last[:, -1]
    room = np.empty_like(last)
    for step in reversed(steps):
        rest = np.maximum(step, rest, out=room).min(axis=1)
    return float(rest[0])


def quickest_in_order(
    kinds: Sequence[int], busy: Sequence[Table], hops: Sequence[Table], limit_s: float
) -> Cut | None:
    """Return the cut of least sum with no stage above `limit_s`, None when there is none."""
    last = busy[-1][:, -1]
    rests = [np.where(last <= limit_s, last, np.inf)]
    steps: list[Table] = []
    for table, hop in zip(busy[-2::-1], hops[::-1], strict=True):
        step = table + hop
        step = np.where(step <= limit_s, step, np.inf) + rests[-1]
        steps.append(step)
        rests.append(step.min(axis=1))
    if not np.isfinite(rests[-1][0]):
        return None
    bounds = [0]
    for step in reversed(steps):
        bounds.append(int(step[bounds[-1]].argmin()))
    bounds.append(len(last) - 1)
    return _cut(tuple(kinds), tuple(bounds), busy, hops)


def best_in_order(
    kinds: Sequence[int],
    busy: Sequence[Table],
    hops: Sequence[Table],
    *,
    slacks: Sequence[float] = (1.0, 1.02, 1.1, np.inf),
) -> list[Cut]:
    """Return cuts for a given order: the least slowest stage first, then sums bought with slack.

    The first is exact in its slowest stage and, among those, in its sum.
    """
    steps = [table + hop for table, hop in zip(busy, hops, strict=False)]
    least = slowest_in_order(steps, busy[-1])
    if not np.isfinite(least):
        return []
    found: list[Cut] = []
    for slack in slacks:
        cut = quickest_in_order(kinds, busy, hops, least * slack * (1 + 1e-12))
        if cut is not None and (not found or cut.sum_s < found[-1].sum_s):
            found.append(cut)
    return found


def _cut(
    kinds: tuple[int, ...], bounds: tuple[int, ...], busy: Sequence[Table], hops: Sequence[Table]
) -> Cut:
    times = [float(table[a, e]) for table, a, e in zip(busy, bounds, bounds[1:], strict=False)]
    for stage, hop in enumerate(hops):
        times[stage] += float(hop[bounds[stage + 1]])
    return Cut(kinds, bounds, sum(times), max(times))


BusyAt = Callable[[int, int], Table]
"""(kind, position from the end) → its table."""
HopOf = Callable[[int, int], Table]
"""(kind, kind of the next stage) → seconds in front of each layer."""


def fronts(
    num_slots: Counts,
    busy_at: BusyAt,
    hop_of: HopOf,
    *,
    max_stages: int | None = None,
    limit_s: float = np.inf,
) -> dict[Counts, list[Cut]]:
    """Return for each choice of slots (all of them used, in the best order) its Pareto front.

    Exact over orders and cuts: work grows with the product of `num_slots` + 1, so for small pools.
    Fronts fall in `max_s` and rise in `sum_s`, from below `limit_s`. Choices that cannot hold the
    model are absent.
    """
    program = _Program(num_slots, busy_at, hop_of, max_stages)
    found: dict[Counts, list[Cut]] = {}
    limit = limit_s
    while np.isfinite(best := program.sweep(limit, found)):
        limit = best
    return {counts: found[counts] for counts in sorted(found)}


class _Program:
    """One dynamic program over (slots used, kind of the first stage, its first layer).

    `sweep` finds the least sums with every stage below a limit; sweeping with the largest slowest
    stage found so far as the next limit walks all fronts at once, point by point.
    """

    def __init__(
        self, num_slots: Counts, busy_at: BusyAt, hop_of: HopOf, max_stages: int | None
    ) -> None:
        kinds = range(len(num_slots))
        self._kinds = kinds
        most = min(sum(num_slots), max_stages or sum(num_slots))
        states = (c for c in product(*(range(n + 1) for n in num_slots)) if 0 < sum(c) <= most)
        self._states = sorted(states, key=sum)
        depth = max((sum(c) for c in self._states), default=0)
        self._last = [busy_at(kind, 0)[:, -1] for kind in kinds]
        # Per kind and position: the tables against each kind of next stage, side by side.
        self._steps = [
            [
                np.concatenate([busy_at(kind, at) + hop_of(kind, after) for after in kinds], axis=1)
                for at in range(1, depth)
            ]
            for kind in kinds
        ]
        self._rest: dict[Counts, Table] = {}

    def sweep(self, limit: float, found: dict[Counts, list[Cut]]) -> float:
        """Add the next point of each front below `limit`; return the largest slowest stage."""
        last = [np.where(row < limit, row, np.inf) for row in self._last]
        steps = [[np.where(s < limit, s, np.inf) for s in of] for of in self._steps]
        largest = -np.inf
        for counts in self._states:
            self._rest[counts] = self._row(counts, last, steps)
            best = self._rest[counts][:, 0].min()
            front = found.get(counts)
            if front and front[-1].max_s < limit:
                largest = max(largest, front[-1].max_s)  # still the best below this limit
            elif np.isfinite(best):
                cut = self._walk(counts, last, steps)
                _add(found.setdefault(counts, []), cut)
                largest = max(largest, cut.max_s)
        return largest if largest > 0 else np.inf

    def _row(self, counts: Counts, last: list[Table], steps: list[list[Table]]) -> Table:
        size = len(last[0])
        rows = np.full((len(self._kinds), size), np.inf)
        for kind in self._kinds:
            if not counts[kind]:
                continue
            if sum(counts) == 1:
                rows[kind] = last[kind]
                continue
            rest = self._rest[_without(counts, kind)].reshape(-1)
            rows[kind] = (steps[kind][sum(counts) - 2] + rest).min(axis=1)
        return rows

    def _walk(self, counts: Counts, last: list[Table], steps: list[list[Table]]) -> Cut:
        """Follow the best choices from the first stage to the last."""
        size = len(last[0])
        kind, at = int(self._rest[counts][:, 0].argmin()), 0
        kinds, bounds, times = [kind], [0], []
        while sum(counts) > 1:
            step = steps[kind][sum(counts) - 2][at]
            counts = _without(counts, kind)
            choice = int((step + self._rest[counts].reshape(-1)).argmin())
            times.append(float(step[choice]))
            kind, at = divmod(choice, size)
            kinds.append(kind)
            bounds.append(at)
        times.append(float(last[kind][at]))
        return Cut(tuple(kinds), (*bounds, size - 1), sum(times), max(times))


def _add(front: list[Cut], cut: Cut) -> None:
    """Append a cut whose slowest stage is quicker than the last one's; drop what it beats."""
    if front and front[-1].sum_s >= cut.sum_s * (1 - 1e-12):
        front.pop()
    front.append(cut)


def _without(counts: Counts, kind: int) -> Counts:
    return (*counts[:kind], counts[kind] - 1, *counts[kind + 1 :])
