"""One pipeline over given slots: a rough time for choosing, exact cuts for what was chosen.

Start at `Ways`. Rough means: the exact least slowest stage, taken for all stages alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mxn.train.plan.cluster import Link
from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.cuts import Table, best_in_order, slowest_in_order
from mxn.train.plan.search.draft import Style, Template, template
from mxn.train.plan.search.shares import Pace
from mxn.train.plan.search.tables import Tables

Row = tuple[Kind, ...]
"""A slot for each stage, in order."""


@dataclass(frozen=True, slots=True)
class Way:
    """A row of slots and its rough paces: while gradients stay inside groups, and if they cross."""

    row: Row
    inside: Pace
    across: Pace


class Ways:
    """Pipelines for one micro-batch and number of shards; each is looked at once."""

    def __init__(
        self, tables: Tables, micro_batches: int, *, fill: float, max_stages: int | None = None
    ) -> None:
        self.tables = tables
        self.micro_batches = micro_batches
        self.max_stages = min(max_stages or 64, tables.job.shape.num_layers)
        self.fill = fill
        self._rough: dict[Row, Way | None] = {}
        self._exact: dict[tuple[Row, Style, int, bool, bool], tuple[Template, ...]] = {}
        groups = tables.job.cluster.groups
        links = [tables.job.cluster.link(a.name, 0, b.name, 0) for a, b in pairwise(groups)]
        self._outer = max(links, key=lambda link: link.transfer_s(1e9), default=None)

    def rough(self, counts: Counter[Kind]) -> Way | None:
        """Return the rough way over these slots; None when the model does not fit."""
        row = self.row(counts)
        if row not in self._rough:
            self._rough[row] = self._look(row)
        return self._rough[row]

    def exact(
        self, row: Row, style: Style, micro_batches: int, *, crossing: bool, waits: bool = True
    ) -> tuple[Template, ...]:
        """Return cuts of this row and of the reverse one, none worse than another in all.

        They fit under `style` when a pipeline does about `micro_batches`. Without `waits` handing
        over is taken as hidden behind compute.
        """
        key = (row, style, micro_batches, crossing, waits)
        if key not in self._exact:
            orders = dict.fromkeys((row, row[::-1]))
            found = [c for o in orders for c in self._cut(o, style, micro_batches, crossing, waits)]
            self._exact[key] = tuple(_undominated(found))
        return self._exact[key]

    def row(self, counts: Counter[Kind]) -> Row:
        """Return slots group by group, those with most memory for their speed first.

        The first stages keep most micro-batches.
        """
        cluster = self.tables.job.cluster

        def room(kind: Kind) -> float:
            memory = cluster.group(kind.group).memory_bytes * kind.tp
            return memory * self.tables.work_s(kind)

        used = sorted((k for k, n in counts.items() if n), key=lambda k: (-room(k), k))
        return tuple(kind for kind in used for _ in range(counts[kind]))

    def shallowest(self, slots: Counter[Kind]) -> int:
        """Return a depth below which the model cannot fit on such slots, whatever the cut."""
        how = self.tables.job.recompute[-1]
        cluster = self.tables.job.cluster
        share = sum(
            n * cluster.group(k.group).memory_bytes / float(self.tables.bytes(k, how, 1)[0, -1])
            for k, n in slots.items()
        )
        return max(1, int(sum(slots.values()) / share)) if share else self.max_stages + 1

    def _look(self, row: Row) -> Way | None:
        if not 1 <= len(row) <= self.max_stages:
            return None
        least = slowest_in_order(self._steps_of(row), self.tables.busy(row[-1], 1))
        if least == float("inf"):
            return None
        start = (len(row) - 1) * least * self.fill
        inside, across = (self._sum_s(row, least, crossing) for crossing in (False, True))
        return Way(row, Pace(start + inside, least), Pace(start + across, least))

    def _sum_s(self, row: Row, least: float, crossing: bool) -> float:
        """Return about how long the largest stage sums its gradients."""
        model, worst = self.tables.job.memory, 0.0
        for kind in set(row):
            share = min(least / self.tables.work_s(kind), 1.0)
            size = self.tables.job.shape.params * share / kind.tp
            size *= model.reduce_bytes * model.trainable_share
            links = self._links([kind], crossing)
            sum_s = sum(2 * link.transfer_s(size, is_float32=True) for link in links)
            backward_s = least * self.tables.backward_share(kind)
            worst = max(worst, self.tables.exposed_s(kind, sum_s, backward_s))
        return worst

    def _cut(
        self, row: Row, style: Style, micro_batches: int, crossing: bool, waits: bool
    ) -> list[Template]:
        size, hops = len(row), [self.tables.hop(a, b) * waits for a, b in pairwise(row)]
        busy = [
            self.tables.busy(kind, style.in_flight(s, size, micro_batches))
            for s, kind in enumerate(row)
        ]
        if style.chunks > 1:
            enough = np.tri(len(busy[0]), k=-style.chunks, dtype=bool).T
            busy = [np.where(enough, table, np.inf) for table in busy]
        kinds = tuple(dict.fromkeys(row))
        numbers = [kinds.index(kind) for kind in row]
        found = best_in_order(numbers, busy, hops, slacks=(1.0, 1.05, float("inf")))
        links = self._links(kinds, crossing)
        return [template(kinds, cut, self.tables.after_s(kinds, cut, links)) for cut in found]

    def _steps_of(self, row: Row) -> list[Table]:
        return [
            self.tables.step(kind, row[s + 1], min(len(row) - s, self.micro_batches))
            for s, kind in enumerate(row[:-1])
        ]

    def _links(self, kinds: Sequence[Kind], crossing: bool) -> list[Link]:
        """Return the links that a sum of gradients goes over: inside a group, then between them."""
        groups = [self.tables.job.cluster.group(kind.group) for kind in kinds]
        links = [g.group_link if g.num_nodes > 1 else g.node_link for g in groups]
        inner = max(links, key=lambda link: link.transfer_s(1e9))
        return [inner, self._outer] if crossing and self._outer else [inner]


def _undominated(ways: list[Template]) -> list[Template]:
    """Return those that no other beats in both start and pace."""
    ways.sort(key=lambda t: (t.max_s, t.pace().start_s))
    kept: list[Template] = []
    for way in ways:
        if not kept or way.pace().start_s < kept[-1].pace().start_s:
            kept.append(way)
    return kept
