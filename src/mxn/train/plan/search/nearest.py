"""When nothing fits: the plan that comes nearest, what its fullest device lacks, what would help.

Nearest is the plan whose fullest device passes its limit by the least share. For each choice of
widths the program of `cuts` finds it over tables of shares instead of seconds, with all slots in
one pipeline or in copies. What is suggested was tried on that plan. Start at `no_plan`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod

import numpy as np

from mxn.errors import CapacityError
from mxn.train.plan.memory import Parts, in_flight
from mxn.train.plan.plan import Chunk, Pipeline, Recompute, Stage, TrainPlan
from mxn.train.plan.search.build import plan_of
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.cuts import Cut, Table, quickest_in_order, slowest_in_order
from mxn.train.plan.search.draft import Draft, Style, template
from mxn.train.plan.search.order import Pool
from mxn.train.plan.search.tables import Job, Kind, TableBook, Tables
from mxn.train.plan.search.ways import Ways
from mxn.train.plan.solved import book_of, device_bytes
from mxn.units import format_bytes

_MOST_CHOICES = 64  # of widths
_COPIES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Nearest:
    """A plan, and the share of its limit that its fullest device takes."""

    plan: TrainPlan
    share: float


def nearest(book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool]) -> Nearest | None:
    """Return the plan whose fullest device passes its limit least; None when there is no plan.

    Its share may be at most 1: then it fits, and the search looked elsewhere.
    """
    found = _candidates(book, rows, limits, pools)
    return min(found, key=lambda near: (near.share, near.plan.num_devices), default=None)


def no_plan(book: TableBook, rows: int, limits: Limits, found: Nearest | None) -> CapacityError:
    """Return the error of a search in which nothing fits."""
    if found is None:
        return CapacityError(
            "the model does not fit into this pool: it has fewer layers than a plan needs stages",
            hint="allow deeper pipelines, or give more devices",
        )
    plan = found.plan
    at, fullest, stage = _fullest(book.job, plan)
    limit = book.job.cluster.group(stage.group).memory_bytes
    lacking = fullest.total - limit
    where = f"stage {at[1]} of pipeline {at[0]}" if plan.num_devices > 1 else "the one stage"
    return CapacityError(
        f"the model does not fit into this pool: in the plan that comes nearest, {where} "
        f"({stage.num_layers} of {plan.num_layers} layers on group {stage.group!r}, tensor width "
        f"{stage.tp}, {_how(stage.recompute)}, {plan.schedule}, micro-batches of {plan.micro_batch}"
        f"{', optimizer shared out' if plan.shards_optimizer else ''}) needs "
        f"{format_bytes(fullest.total)} on each device, {format_bytes(lacking)} more than the "
        f"{format_bytes(limit)} that it may use: {_of_what(fullest)}",
        hint=_hint(book, rows, limits, plan, stage, fullest, limit),
    )


def _how(recompute: Recompute) -> str:
    return "nothing computed again" if recompute == "none" else f"{recompute} recomputation"


def _of_what(parts: Parts) -> str:
    """Return the largest parts of what a device would hold."""
    named = (
        ("weights, gradients and optimizer", parts.state),
        ("activations", parts.activations),
        ("messages", parts.messages),
        ("headroom", parts.headroom),
        ("the framework", parts.framework),
    )
    large = [(what, size) for what, size in named if size >= 0.005 * parts.total]
    return ", ".join(f"{format_bytes(size)} {what}" for what, size in large)


def _hint(
    book: TableBook, rows: int, limits: Limits, plan: TrainPlan, stage: Stage, fullest: Parts,
    limit: int,
) -> str:  # fmt: skip
    """Say what would bring this device under its limit, or at least nearer, and is not used yet."""
    job = book.job
    found: list[str] = []
    depth = max(len(pipeline.stages) for pipeline in plan.pipelines)
    if "1f1b" not in limits.schedules:
        found += _gain(job, _in_1f1b(plan), fullest, "schedule 1f1b")
    for how in ("selective", "full"):
        if how not in limits.recompute and stage.recompute != how:
            other = _with(plan, recompute=how)
            found += _gain(job, other, fullest, f"{how} recomputation")
    if not limits.may_shard_optimizer and len(plan.pipelines) > 1:
        found += _gain(job, replace(plan, shards_optimizer=True), fullest, "a shared-out optimizer")
    if plan.micro_batch > 1 and fullest.activations > 0.1 * fullest.total:
        found.append("a smaller micro-batch, for which the activations shrink")
    elif fullest.activations > 0.1 * fullest.total:
        found.append("shorter rows, for which the activations shrink")
    width = min(stage.tp * 2, job.cluster.group(stage.group).devices_per_node)
    is_barred = limits.tps is not None and width not in limits.tps
    if is_barred and job.is_profiled(Kind(stage.group, width), plan.micro_batch):
        found.append(f"tensor parallelism over {width} devices of {stage.group!r}")
    model = job.profiles[job.cluster.group(stage.group).chip].memory or job.memory
    if model.trainable_share == 1.0 and fullest.state > 0.5 * fullest.total:
        found.append("LoRA, which keeps no gradients and no optimizer for the model's own weights")
    if limits.max_stages is not None and depth >= limits.max_stages:
        found.append(
            f"pipelines deeper than {limits.max_stages} stage{'s' * (limits.max_stages > 1)}"
        )
    if stage.num_layers > 1:
        found.append("more devices")
    else:
        found.append("devices with more memory: this one holds a single layer")
    if fullest.framework > 0.5 * limit:
        found.append(f"a higher limit: the framework alone takes {format_bytes(fullest.framework)}")
    return "what would help: " + "; ".join(found)


def _gain(job: Job, other: TrainPlan, before: Parts, what: str) -> Iterator[str]:
    after = _fullest(job, other)[1].total
    if after < 0.99 * before.total:
        yield f"{what} ({format_bytes(after)} instead)"


def _with(plan: TrainPlan, *, recompute: Recompute) -> TrainPlan:
    return replace(
        plan,
        pipelines=tuple(
            replace(p, stages=tuple(replace(s, recompute=recompute) for s in p.stages))
            for p in plan.pipelines
        ),
    )


def _in_1f1b(plan: TrainPlan) -> TrainPlan:
    """Return the plan under 1F1B, each stage with as many layers as before in one chunk."""
    pipelines: list[Pipeline] = []
    for pipeline in plan.pipelines:
        ends = accumulate(stage.num_layers for stage in pipeline.stages)
        stages = tuple(
            replace(stage, chunks=(Chunk(first=end - stage.num_layers, end=end),))
            for stage, end in zip(pipeline.stages, ends, strict=True)
        )
        pipelines.append(replace(pipeline, stages=stages))
    return replace(plan, schedule="1f1b", pipelines=tuple(pipelines))


def _fullest(job: Job, plan: TrainPlan) -> tuple[tuple[int, int], Parts, Stage]:
    """Return the device that passes its limit by the largest share: where, and what it holds."""
    costs = book_of(plan, job.shape, job.profiles, job.memory)
    found: list[tuple[float, tuple[int, int], Parts, Stage]] = []
    for p, pipeline in enumerate(plan.pipelines):
        size = len(pipeline.stages)
        for s, stage in enumerate(pipeline.stages):
            group = job.cluster.group(stage.group)
            kept = in_flight(plan.schedule, s, size, pipeline.micro_batches, len(stage.chunks))
            cost = costs.stage(group.chip, stage)
            parts = device_bytes(stage, cost, kept, job.profiles[group.chip], job.memory)
            found.append((parts.total / group.memory_bytes, (p, s), parts, stage))
    _, at, parts, stage = max(found, key=lambda one: one[0])
    return at, parts, stage


def _candidates(
    book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool]
) -> Iterator[Nearest]:
    """Yield plans of all choices; 1F1B holds least, so others are looked at where it is barred."""
    styles = limits.styles[:1] if "1f1b" in limits.schedules else limits.styles
    for pool in sorted(pools, key=lambda pool: pool.micro_batch)[:2]:
        for kinds, num, style in product(_choices(pool), _COPIES, styles):
            if num > rows // pool.micro_batch:
                continue
            slots = {kind: book.job.num_slots(kind) // num for kind in kinds}
            shards = num if limits.may_shard_optimizer else 1
            tables = book.at(pool.micro_batch, shards)
            yield from _nearest(book, tables, rows, limits, slots, num, style)


def _choices(pool: Pool) -> list[tuple[Kind, ...]]:
    """Return a kind of slot for each group, in all ways; where those are many, like widths."""
    if prod(map(len, pool.options)) <= _MOST_CHOICES:
        return list(product(*pool.options))
    widths = sorted({kind.tp for of in pool.options for kind in of})
    found = [tuple(min(of, key=lambda k: abs(k.tp - tp)) for of in pool.options) for tp in widths]
    return list(dict.fromkeys(found))


def _nearest(
    book: TableBook, tables: Tables, rows: int, limits: Limits, slots: dict[Kind, int], num: int,
    style: Style,
) -> Iterator[Nearest]:  # fmt: skip
    """Yield the nearest plan of `num` like pipelines over these slots each, in a good order."""
    count = rows // tables.micro_batch
    most = -(-count // num)  # of one pipeline
    ways = Ways(tables, count, fill=1.0, max_stages=limits.max_stages)
    row = ways.row(Counter(slots))
    if not row:
        return
    for order in dict.fromkeys((row[: ways.max_stages], row[-ways.max_stages :])):
        shares = [
            _shares(tables, kind, style.in_flight(s, len(order), most), style.chunks)
            for s, kind in enumerate(order)
        ]
        none = np.zeros(len(shares[0]))
        least = slowest_in_order(shares[:-1], shares[-1])
        kinds = tuple(dict.fromkeys(order))
        numbers = [kinds.index(kind) for kind in order]
        cut = quickest_in_order(
            numbers, shares, [none] * (len(order) - 1), least * (1 + 1e-9)
        ) if np.isfinite(least) else None  # fmt: skip
        plan = _plan(book, tables, kinds, cut, rows, num, style) if cut else None
        if plan is not None:
            plan = _with_least(book.job, plan)
            _, fullest, stage = _fullest(book.job, plan)
            limit = book.job.cluster.group(stage.group).memory_bytes
            yield Nearest(plan, fullest.total / limit)


def _shares(tables: Tables, kind: Kind, kept: float, chunks: int) -> Table:
    """Return the share [a, e] of a device's limit that layers a … e - 1 take at the least.

    Infinite for fewer layers than a stage has chunks.
    """
    limit = tables.job.cluster.group(kind.group).memory_bytes
    least = np.minimum.reduce([tables.bytes(kind, how, kept) for how in tables.job.recompute])
    enough = np.tri(len(least), k=-chunks, dtype=bool).T
    return np.where(enough, least / limit, np.inf)


def _plan(
    book: TableBook, tables: Tables, kinds: Sequence[Kind], cut: Cut, rows: int, num: int,
    style: Style,
) -> TrainPlan | None:  # fmt: skip
    count = rows // tables.micro_batch
    shares = tuple(count // num + (p < count % num) for p in range(num))
    draft = Draft(
        tables.micro_batch, ((template(kinds, cut, 0.0), num),), 0.0, "nearest",
        tables.shards > 1, style, shares=shares,
    )  # fmt: skip
    return plan_of(book, draft, rows)


def _with_least(job: Job, plan: TrainPlan) -> TrainPlan:
    """Return the plan with the recomputation under which its fullest device holds least."""
    plans = [_with(plan, recompute=how) for how in job.recompute]
    return min(plans, key=lambda one: _fullest(job, one)[1].total)
