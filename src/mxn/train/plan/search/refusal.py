"""What is said when nothing fits: what the nearest plan lacks, and what would help.

Where a help names bytes, these were computed for the nearest plan. The others make a part of what
its fullest device holds smaller, by how much nobody says. Start at `no_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from mxn.errors import CapacityError
from mxn.train.plan.memory import Parts
from mxn.train.plan.plan import Chunk, Pipeline, Recompute, TrainPlan
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.nearest import Held, Nearest, fullest, held, with_recompute
from mxn.units import format_bytes


@dataclass(frozen=True, slots=True)
class _Case:
    """The nearest plan of a job, and its fullest device."""

    job: Job
    limits: Limits
    plan: TrainPlan
    worst: Held

    @property
    def limit(self) -> int:
        return self.job.cluster.group(self.worst.stage.group).memory_bytes

    @property
    def depth(self) -> int:
        return max(len(pipeline.stages) for pipeline in self.plan.pipelines)


def no_plan(job: Job, limits: Limits, found: Nearest | None) -> CapacityError:
    """Return the error of a search in which nothing fits, `found` being what comes nearest."""
    if found is None:
        return CapacityError(
            "the model does not fit into this pool: it has fewer layers than a plan needs stages",
            hint="allow deeper pipelines, or give more devices",
        )
    plan, worst = found.plan, fullest(job, found.plan)
    case, stage, total = _Case(job, limits, plan, worst), worst.stage, worst.parts.total
    at = f"stage {worst.at[1]} of pipeline {worst.at[0]}"
    return CapacityError(
        f"the model does not fit into this pool: in the plan that comes nearest, "
        f"{at if plan.num_devices > 1 else 'the one stage'} "
        f"({stage.num_layers} of {plan.num_layers} layers on group {stage.group!r}, tensor width "
        f"{stage.tp}, {_how(stage.recompute)}, {plan.schedule}, micro-batches of {plan.micro_batch}"
        f"{', optimizer shared out' if plan.shards_optimizer else ''}) needs "
        f"{format_bytes(total)} on each device, {format_bytes(total - case.limit)} more than the "
        f"{format_bytes(case.limit)} that it may use: {_of_what(worst.parts)}",
        hint="what would help: " + "; ".join(_helps(case)),
    )


def _how(recompute: Recompute) -> str:
    return "nothing computed again" if recompute == "none" else f"{recompute} recomputation"


def _of_what(parts: Parts) -> str:
    """Return the largest parts of what a device would hold."""
    named = (
        ("weights, gradients and optimizer", parts.state),
        ("copies of these for checkpoints", parts.copies),
        ("activations", parts.activations),
        ("messages", parts.messages),
        ("headroom", parts.headroom),
        ("the framework", parts.framework),
    )
    large = [(what, size) for what, size in named if size >= 0.005 * parts.total]
    return ", ".join(f"{format_bytes(size)} {what}" for what, size in large)


def _helps(case: _Case) -> Iterator[str]:
    """Yield what would bring the fullest device nearer to its limit, and is not used yet."""
    yield from _by_plan(case)
    yield from _by_rows(case)
    yield from _by_width(case)
    model, parts = case.job.memory, case.worst.parts
    model = case.job.profiles[case.job.cluster.group(case.worst.stage.group).chip].memory or model
    if model.trainable_share == 1.0 and parts.state > 0.5 * parts.total:
        yield "LoRA, which keeps no gradients and no optimizer for the model's own weights"
    yield from _by_devices(case)
    if parts.framework > 0.5 * case.limit:
        yield f"a higher limit: the framework alone takes {format_bytes(parts.framework)}"


def _by_plan(case: _Case) -> Iterator[str]:
    """Yield what the job's own limits forbid and this plan could do."""
    limits, plan = case.limits, case.plan
    if "1f1b" not in limits.schedules:
        yield from _gain(case, _in_1f1b(plan), "schedule 1f1b")
    for how in ("selective", "full"):
        if how not in limits.recompute and case.worst.stage.recompute != how:
            yield from _gain(case, with_recompute(plan, how), f"{how} recomputation")
    if not limits.may_shard_optimizer and len(plan.pipelines) > 1:
        yield from _gain(case, replace(plan, shards_optimizer=True), "a shared-out optimizer")


def _by_rows(case: _Case) -> Iterator[str]:
    if case.worst.parts.activations > 0.1 * case.worst.parts.total:
        many = case.plan.micro_batch > 1
        what = "a smaller micro-batch" if many else "shorter rows"
        yield f"{what}, for which the activations shrink"


def _by_width(case: _Case) -> Iterator[str]:
    """Yield the next width, if it is barred and profiled, and there are devices for it."""
    job, stage, limits = case.job, case.worst.stage, case.limits
    group, width = job.cluster.group(stage.group), stage.tp * 2
    used = sum(s.tp for p in case.plan.pipelines for s in p.stages if s.group == stage.group)
    is_barred = limits.tps is not None and width not in limits.tps
    if not is_barred or width > min(group.devices_per_node, group.num_devices):
        return
    if not job.is_profiled(Kind(stage.group, width), case.plan.micro_batch):
        return
    # With as many devices twice the width is half the stages, which gains nothing but where a
    # stage cannot be divided otherwise.
    if used + stage.tp > group.num_devices and stage.num_layers > 1:
        return
    number, at = case.worst.at
    pipelines, stages = list(case.plan.pipelines), list(case.plan.pipelines[number].stages)
    stages[at] = replace(stage, tp=width)
    pipelines[number] = replace(pipelines[number], stages=tuple(stages))
    what = f"tensor parallelism over {width} devices of {stage.group!r}"
    yield from _gain(case, replace(case.plan, pipelines=tuple(pipelines)), what, is_plan=False)


def _by_devices(case: _Case) -> Iterator[str]:
    most, stage = case.limits.max_stages, case.worst.stage
    if stage.num_layers == 1:
        yield "devices with more memory: this one holds a single layer"
    elif most is None or case.depth < most:
        yield "more devices"
    else:
        slots = sum(group.num_devices // stage.tp for group in case.job.cluster.groups)
        over = "" if case.depth < slots else " over more devices"
        yield f"pipelines deeper than {most} stage{'s' * (most > 1)}{over}"


def _gain(case: _Case, other: TrainPlan, what: str, *, is_plan: bool = True) -> Iterator[str]:
    """Yield what the same device takes in another plan, if that is less, and whether it is enough.

    Where `other` is no whole plan, only this stage of it counts.
    """
    after = held(case.job, other, case.worst.at)
    if after.parts.total >= 0.99 * case.worst.parts.total:
        return
    fits = (fullest(case.job, other) if is_plan else after).share <= 1
    end = ", not enough alone" if not fits else ", then it fits" if is_plan else ""
    yield f"{what} ({format_bytes(after.parts.total)} instead{end})"


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
