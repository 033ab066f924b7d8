"""Few devices: every order and every cut, timed as the predictor times them. Start at `Every`.

The programs of `cuts` take sum + (m - 1)·slowest, with a hop as work of the stage before it. Where
hops are as long as stages that misjudges plans by many percent, for several micro-batches share the
way. Here nothing is approximated but sums of gradients, which depend on the other pipelines: sets
of pipelines are drafted from the quickest few of each, and `judge` predicts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, islice, pairwise, product
from math import comb, factorial, prod

import numpy as np
from numpy.typing import NDArray

from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.cuts import Counts
from mxn.train.plan.search.draft import Draft, Style, Template
from mxn.train.plan.search.forms import pipelines_s
from mxn.train.plan.search.tables import Tables

_MOST_LINES = 150_000  # orders times cuts; some 50 ms to time them all once
_MOST_SETS = 250  # of pipelines
_NUM_ALONE = 12  # pipelines over given slots that are judged
_MOST_MIXES = 36  # of them for one set
_STEPS = 20  # of the bisection for the shares of a set: a millionth


def is_countable(num_slots: Counts, num_layers: int, max_stages: int | None = None) -> bool:
    """Return whether orders, cuts and sets of pipelines are few enough to time them all."""
    choices = list(_choices(num_slots, max_stages))
    if sum(_num_lines(slots, num_layers) for slots in choices) > _MOST_LINES:
        return False
    sets = islice(partitions(num_slots, choices), _MOST_SETS + 1)
    return sum(1 for _ in sets) <= _MOST_SETS


def _num_lines(slots: Counts, num_layers: int) -> int:
    orders = factorial(sum(slots)) // prod(map(factorial, slots))
    return orders * comb(num_layers - 1, sum(slots) - 1)


def _choices(num_slots: Counts, max_stages: int | None) -> Iterator[Counts]:
    """Yield what a pipeline could be made of."""
    most = max_stages or sum(num_slots)
    for slots in product(*(range(n + 1) for n in num_slots)):
        if 0 < sum(slots) <= most:
            yield slots


class Every:
    """All pipelines of a choice of slots under one schedule of one chunk."""

    def __init__(
        self,
        tables: Tables,
        kinds: Sequence[Kind],
        num_slots: Counts,
        micro_batches: int,
        style: Style,
        *,
        max_stages: int | None = None,
        worth_s: float = float("inf"),
    ) -> None:
        """What takes more than `worth_s` is left out."""
        self._tables, self._kinds, self._num_slots = tables, tuple(kinds), num_slots
        self._count, self._style, self._worth_s = micro_batches, style, worth_s
        self._choices = list(_choices(num_slots, max_stages))
        self._known: dict[tuple[Counts, int], list[tuple[float, Template]]] = {}

    def drafts(self) -> list[Draft]:
        """Return the quickest pipelines alone, then sets of several, the most promising first."""
        found: list[Draft] = []
        if self._tables.shards == 1:
            found = [
                self._draft([line], [self._count], seconds, "one pipeline")
                for slots in self._choices
                for seconds, line in self._lines(slots, self._count)
            ]
        for chosen in partitions(self._num_slots, self._choices):
            rows = [slots for slots, num in sorted(chosen.items()) for _ in range(num)]
            # Where the optimizer is shared out, each pipeline of a set has a shard.
            if 1 < len(rows) <= self._count and self._tables.shards in (1, len(rows)):
                found += self._set(rows)
        return sorted(found, key=lambda draft: draft.estimate_s)

    def _set(self, rows: Sequence[Counts]) -> list[Draft]:
        """Return drafts of pipelines over these slots, with the shares that end soonest."""
        shares = self._shares(rows)
        if shares is None:
            return []
        by_row = [self._lines(slots, n) for slots, n in zip(rows, shares, strict=True)]
        num = 1
        while num < _NUM_ALONE and prod(min(num + 1, len(of)) for of in by_row) <= _MOST_MIXES:
            num += 1
        origin = "copies of one pipeline" if len(set(rows)) == 1 else "mix of pipelines"
        drafts = [
            self._draft([line for _, line in lines], shares, max(s for s, _ in lines), origin)
            for lines in product(*(of[:num] for of in by_row))
        ]
        return sorted(drafts, key=lambda draft: draft.estimate_s)

    def _shares(self, rows: Sequence[Counts]) -> list[int] | None:
        """Return micro-batches of each pipeline that end soonest; None: not within the limit."""
        high = min(self._worth_s, max(self._seconds(slots, self._count) for slots in rows))
        if not np.isfinite(high):
            high = min(self._worth_s, 1e30)
        low = 0.0
        if sum(self._most(slots, high) for slots in rows) < self._count:
            return None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if sum(self._most(slots, middle) for slots in rows) >= self._count:
                high = middle
            else:
                low = middle
        shares = [self._most(slots, high) for slots in rows]
        while sum(shares) > self._count:
            last = max(range(len(rows)), key=lambda p: self._seconds(rows[p], shares[p]))
            shares[last] -= 1
        return shares if min(shares) else None

    def _most(self, slots: Counts, seconds: float) -> int:
        """Return how many micro-batches the best pipeline over these slots does in the time."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high + 1) // 2
            if self._seconds(slots, middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _seconds(self, slots: Counts, count: int) -> float:
        if not count:
            return 0.0
        lines = self._lines(slots, count)
        return lines[0][0] if lines else float("inf")

    def _lines(self, slots: Counts, count: int) -> list[tuple[float, Template]]:
        """Return the quickest pipelines over these slots, in any order, with their seconds."""
        key = (slots, count)
        if key not in self._known:
            rows = set(_orders(slots))
            found = [timed for row in sorted(rows) for timed in self._cuts(row, count)]
            found.sort(key=lambda timed: timed[0])
            self._known[key] = found[:_NUM_ALONE]
        return self._known[key]

    def _cuts(self, row: tuple[int, ...], count: int) -> list[tuple[float, Template]]:
        tables, size = self._tables, len(row)
        kinds = [self._kinds[number] for number in row]
        bounds = _bounds(len(tables.job.shape.layers), size)
        kept = [self._style.in_flight(s, size, count) for s in range(size)]
        parts = [tables.parts(kind, keep) for kind, keep in zip(kinds, kept, strict=True)]

        def at(number: int) -> list[NDArray[np.float64]]:
            return [part[number][bounds[s], bounds[s + 1]] for s, part in enumerate(parts)]

        busy = np.maximum.reduce([
            tables.busy(kind, keep)[bounds[s], bounds[s + 1]]
            for s, (kind, keep) in enumerate(zip(kinds, kept, strict=True))
        ])  # fmt: skip
        bounds = bounds[:, np.isfinite(busy) & (busy * count <= self._worth_s)]
        if not bounds.shape[1]:
            return []
        hops = [tables.hop(a, b)[bounds[s + 1]] for s, (a, b) in enumerate(pairwise(kinds))]
        seconds = pipelines_s(self._style.schedule, at(0), at(1), at(2), hops, count)
        seconds = seconds + np.maximum.reduce(at(3))
        best = np.argsort(seconds, kind="stable")[:_NUM_ALONE]
        return [
            (float(seconds[number]), self._template(kinds, bounds[:, number], kept))
            for number in best
            if seconds[number] <= self._worth_s
        ]

    def _template(
        self, kinds: Sequence[Kind], bounds: NDArray[np.int64], kept: Sequence[float]
    ) -> Template:
        ends = tuple(map(int, bounds))
        times = [
            float(self._tables.busy(kind, keep)[first, end])
            for kind, keep, first, end in zip(kinds, kept, ends, ends[1:], strict=False)
        ]
        for s, (a, b) in enumerate(pairwise(kinds)):
            times[s] += float(self._tables.hop(a, b)[ends[s + 1]])
        return Template(tuple(kinds), ends, sum(times), max(times))

    def _draft(
        self, lines: Sequence[Template], shares: Sequence[int], seconds: float, origin: str
    ) -> Draft:
        return Draft(
            self._tables.micro_batch, tuple((line, 1) for line in lines), seconds, origin,
            self._tables.shards > 1, self._style, shares=tuple(shares),
        )  # fmt: skip


def partitions(left: Counts, choices: Sequence[Counts]) -> Iterator[Counter[Counts]]:
    """Yield all ways to make pipelines of these slots; some slots may stay unused."""
    for number, slots in enumerate(choices):
        rest = tuple(n - take for n, take in zip(left, slots, strict=True))
        if min(rest) < 0:
            continue
        yield Counter({slots: 1})
        for more in partitions(rest, choices[number:]):
            yield more + Counter({slots: 1})


def _orders(slots: Counts) -> Iterator[tuple[int, ...]]:
    """Yield the different orders of slots, by the numbers of their kinds."""
    if not sum(slots):
        yield ()
        return
    for kind, num in enumerate(slots):
        if num:
            rest = (*slots[:kind], num - 1, *slots[kind + 1 :])
            for more in _orders(rest):
                yield (kind, *more)


@cache
def _bounds(num_layers: int, size: int) -> NDArray[np.int64]:
    """Return [border, cut]: 0, the first layers of the later stages, the end."""
    inner = list(combinations(range(1, num_layers), size - 1))
    rows = np.array(inner, dtype=np.int64).reshape(len(inner), size - 1).T
    ends = np.full((1, len(inner)), num_layers)
    return np.concatenate([np.zeros_like(ends), rows, ends])
