"""When nothing fits: the plan that comes nearest. Start at `nearest`.

Nearest is the plan whose fullest device passes its limit by the least share. For each choice of
widths the program of `cuts` finds it over tables of shares instead of seconds, with all slots in
one pipeline or in copies. Knows no words: what is said of it is made by `refusal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from mxn.train.plan.costs import CostBook
from mxn.train.plan.memory import Parts, in_flight
from mxn.train.plan.plan import Recompute, Stage, TrainPlan
from mxn.train.plan.search.build import plan_of
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.cuts import Table, quickest_in_order, slowest_in_order
from mxn.train.plan.search.draft import Draft, Style, template
from mxn.train.plan.search.order import Pool
from mxn.train.plan.search.tables import TableBook, Tables
from mxn.train.plan.search.ways import Row, Ways
from mxn.train.plan.solved import book_of, device_bytes

_MOST_CHOICES = 64  # of widths
_COPIES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Nearest:
    """A plan, and the share of its limit that its fullest device takes."""

    plan: TrainPlan
    share: float


class Held(NamedTuple):
    """What each device of a stage holds, of its limit, and where: pipeline and stage."""

    share: float
    at: tuple[int, int]
    parts: Parts
    stage: Stage


def nearest(book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool]) -> Nearest | None:
    """Return the plan whose fullest device passes its limit least; None when there is no plan.

    Its share may be at most 1: then it fits, and the search looked elsewhere.
    """
    best: Nearest | None = None
    lines = sorted(
        _lines(book, rows, limits, pools), key=lambda line: (line.least, line.num_devices)
    )
    for line in lines:
        if best is not None and line.least >= best.share:
            break  # no plan takes less than its tables say
        plan = line.plan(book, rows)
        if plan is not None:
            plan = _with_least(book.job, plan)
            share = fullest(book.job, plan).share
            if best is None or share < best.share:
                best = Nearest(plan, share)
    return best


def fullest(job: Job, plan: TrainPlan) -> Held:
    """Return what the device that passes its limit by the largest share holds."""
    known: dict[object, int] = {}  # pipelines that are alike are looked at once
    for number, pipeline in enumerate(plan.pipelines):
        stages = tuple((s.group, s.chunks, s.tp, s.recompute) for s in pipeline.stages)
        known.setdefault((pipeline.micro_batches, stages), number)
    costs = book_of(plan, job.shape, job.profiles, job.memory)
    found = [
        held(job, plan, (number, s), costs)
        for number in known.values()
        for s in range(len(plan.pipelines[number].stages))
    ]
    return max(found, key=lambda one: one.share)


def held(job: Job, plan: TrainPlan, at: tuple[int, int], costs: CostBook | None = None) -> Held:
    """Return what a device of a stage holds; `at`: its pipeline and its number there.

    `costs` are those of `book_of`, for who has them already.
    """
    pipeline = plan.pipelines[at[0]]
    stage = pipeline.stages[at[1]]
    group = job.cluster.group(stage.group)
    kept = in_flight(
        plan.schedule, at[1], len(pipeline.stages), pipeline.micro_batches, len(stage.chunks)
    )
    costs = costs or book_of(plan, job.shape, job.profiles, job.memory)
    cost = costs.stage(group.chip, stage)
    parts = device_bytes(stage, cost, kept, job.profiles[group.chip], job.memory)
    return Held(parts.total / group.memory_bytes, at, parts, stage)


def with_recompute(plan: TrainPlan, recompute: Recompute) -> TrainPlan:
    """Return the plan with the same recomputation on all stages."""
    return replace(
        plan,
        pipelines=tuple(
            replace(p, stages=tuple(replace(s, recompute=recompute) for s in p.stages))
            for p in plan.pipelines
        ),
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """`num` like pipelines over the slots of a row; `least`: the share of the best cut."""

    row: Row
    num: int
    style: Style
    tables: Tables
    shares: Sequence[Table]
    least: float

    @property
    def num_devices(self) -> int:
        return self.num * sum(kind.tp for kind in self.row)

    def plan(self, book: TableBook, rows: int) -> TrainPlan | None:
        """Return the plan of least shares; None where stages have too few layers."""
        kinds = tuple(dict.fromkeys(self.row))
        none = np.zeros(len(self.shares[0]))
        cut = quickest_in_order(
            [kinds.index(kind) for kind in self.row], self.shares,
            [none] * (len(self.row) - 1), self.least * (1 + 1e-9),
        )  # fmt: skip
        if cut is None:
            return None
        count = rows // self.tables.micro_batch
        draft = Draft(
            self.tables.micro_batch, ((template(kinds, cut, 0.0), self.num),), 0.0, "nearest",
            self.tables.shards > 1, self.style,
            shares=tuple(count // self.num + (p < count % self.num) for p in range(self.num)),
        )  # fmt: skip
        return plan_of(book, draft, rows)


def _lines(book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool]) -> Iterator[_Line]:
    """Yield all choices; 1F1B holds least, so other schedules are looked at where it is barred."""
    styles = limits.styles[:1] if "1f1b" in limits.schedules else limits.styles
    known: dict[object, Table] = {}
    for pool in sorted(pools, key=lambda pool: pool.micro_batch)[:2]:
        for kinds, num, style in product(_choices(pool), _COPIES, styles):
            if num > rows // pool.micro_batch:
                continue
            slots = Counter({kind: book.job.num_slots(kind) // num for kind in kinds})
            shards = num if limits.may_shard_optimizer else 1
            ways = Ways(
                book.at(pool.micro_batch, shards), rows // pool.micro_batch, fill=1.0,
                max_stages=limits.max_stages,
            )  # fmt: skip
            yield from _in_order(ways, slots, num, style, known)


def _choices(pool: Pool) -> list[tuple[Kind, ...]]:
    """Return a kind of slot for each group, in all ways; where those are many, like widths."""
    if prod(map(len, pool.options)) <= _MOST_CHOICES:
        return list(product(*pool.options))
    widths = sorted({kind.tp for of in pool.options for kind in of})
    found = [tuple(min(of, key=lambda k: abs(k.tp - tp)) for of in pool.options) for tp in widths]
    return list(dict.fromkeys(found))


def _in_order(
    ways: Ways, slots: Counter[Kind], num: int, style: Style, known: dict[object, Table]
) -> Iterator[_Line]:
    """Yield pipelines over these slots in a good order; `known` keeps tables from call to call."""
    row, tables = ways.row(slots), ways.tables
    if not row:
        return
    most = -(-ways.micro_batches // num)  # of one pipeline
    for order in dict.fromkeys((row[: ways.max_stages], row[-ways.max_stages :])):
        shares: list[Table] = []
        for s, kind in enumerate(order):
            kept = style.in_flight(s, len(order), most)
            key = (tables.micro_batch, tables.shards, kind, kept, style.chunks)
            if key not in known:
                known[key] = _shares(tables, kind, kept, style.chunks)
            shares.append(known[key])
        least = slowest_in_order(shares[:-1], shares[-1])
        if np.isfinite(least):
            yield _Line(order, num, style, tables, shares, least)


def _shares(tables: Tables, kind: Kind, kept: float, chunks: int) -> Table:
    """Return the share [a, e] of a device's limit that layers a … e - 1 take at the least.

    Infinite for fewer layers than a stage has chunks.
    """
    limit = tables.job.cluster.group(kind.group).memory_bytes
    least = np.minimum.reduce([tables.bytes(kind, how, kept) for how in tables.job.recompute])
    enough = np.tri(len(least), k=-chunks, dtype=bool).T
    return np.where(enough, least / limit, np.inf)


def _with_least(job: Job, plan: TrainPlan) -> TrainPlan:
    """Return the plan with the recomputation under which its fullest device passes least."""
    plans = [with_recompute(plan, how) for how in job.recompute]
    return min(plans, key=lambda one: fullest(job, one).share)
