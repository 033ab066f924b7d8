"""Sets of pipelines that are not cut yet, and their exact cuts. Start at `draft_of` and `Rough`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mxn.train.plan.search.draft import Draft, Style
from mxn.train.plan.search.packing import soonest
from mxn.train.plan.search.shares import Pace
from mxn.train.plan.search.ways import Row, Way, Ways

Sets = tuple[tuple[Way, int], ...]
"""Pipelines, and how many there are of each."""
WaysOf = Callable[[int, int], Ways]
"""(optimizer shards, pipelines that share experts) → ways."""


@dataclass(frozen=True, slots=True)
class Rough:
    """A set of pipelines that is not cut yet."""

    ways: Ways
    sets: Sets
    estimate_s: float
    origin: str

    def exact(self, ways_of: WaysOf, styles: Sequence[Style]) -> list[Draft]:
        """Cut these pipelines for each schedule, with as much memory as that one leaves.

        Once as if stages waited for what they hand over, once as if it were hidden: the truth
        depends on how many micro-batches are under way, and the judge knows.

        With as many optimizer shards as there are pipelines, if it has any.
        """
        num = sum(num for _, num in self.sets)
        ways = ways_of(num if self.ways.tables.shards > 1 else 1, self.ways.tables.experts)
        drafts = {
            (draft.lines, style): draft
            for style in styles
            for waits in (True, False)
            if (draft := self._cut(ways, style, max(ways.micro_batches // num, 1), waits))
        }
        return list(drafts.values())

    def _cut(self, ways: Ways, style: Style, micro_batches: int, waits: bool) -> Draft | None:
        crossing, fill = len(self.sets) > 1, style.fill
        found = [
            (ways.exact(way.row, style, micro_batches, crossing=crossing, waits=waits), num)
            for way, num in self.sets
        ]
        cuts = [(of, num) for of, num in found if of]
        if not cuts:
            return None
        paces = [(tuple(t.pace(fill) for t in of), num) for of, num in cuts]
        seconds = soonest(paces, ways.micro_batches)
        lines = tuple(
            (max(of, key=lambda t: t.pace(fill).done_in(seconds)), num)
            for of, num in cuts
            if max(t.pace(fill).done_in(seconds) for t in of)
        )
        tables = ways.tables
        return Draft(
            tables.micro_batch, lines, seconds, self.origin, tables.shards > 1, style,
            tables.experts,
        )  # fmt: skip


def draft_of(ways: Ways, sets: Sets, origin: str) -> Rough | None:
    """Return a rough draft. None: nothing, or fewer pipelines than optimizer shards."""
    if not sets or sum(num for _, num in sets) < ways.tables.shards:
        return None
    rows: dict[Row, int] = {}
    by_row = {way.row: way for way, _ in sets}
    for way, num in sets:
        rows[way.row] = rows.get(way.row, 0) + num
    merged = tuple((by_row[row], num) for row, num in rows.items())
    paces = [((pace_of(way, len(rows) > 1),), num) for way, num in merged]
    if sum(num for _, num in merged) == 1:
        origin = "one pipeline"
    return Rough(ways, merged, soonest(paces, ways.micro_batches), origin)


def pace_of(way: Way, crossing: bool) -> Pace:
    """Return a way's rough pace, with gradients summed across groups or inside them."""
    return way.across if crossing else way.inside
