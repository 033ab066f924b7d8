"""What a plan will do, in closed form. Start at `predict`.

`predict(plan, shape, cluster, profiles, memory=MemoryModel()) -> Prediction` is the one call that
planner, commands and tests share. It adds up profiled layer times for each different pipeline once,
so a plan over a thousand devices takes milliseconds. It does not know contention between transfers
that share a wire, nor noise, nor what extra warm-up hides (only what it stores); the event
simulator (`simulate`) replaces its closed form of a pipeline where schedules are uneven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mxn.errors import UserError
from mxn.train.plan.closed import pipeline_time
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.overlap import Overlap, Window, span_of
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.prediction import Prediction, StagePrediction
from mxn.train.plan.profile import Profiles
from mxn.train.plan.reduction import Member, Reduction, again_s, reductions
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.solved import Solved, book_of, solve_all
from mxn.train.plan.totals import basis, cost_micro, energy_j, mfu
from mxn.train.plan.tuning import Timer, Tuning


def predict(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    tuning: Tuning | None = None,
    timer: Timer | None = None,
) -> Prediction:
    """Return what one step of `plan` takes: seconds, bytes of each device, joules, money.

    Each pipeline is timed with its own micro-batches; a stage then sums its gradients with the
    other pipelines (later stages start earlier, and some chips beside their last backward, so part
    of it is hidden), then its optimizer runs.
    `memory` defaults to mixed bf16 with Adam, `timer` to the closed form. A plan that does not fit
    is no error: see `Prediction.fits`. Energy counts the devices of the plan at `watts` through the
    whole step, cost their price.
    Raises: UserError for a plan that is not one, a layer that was not profiled, a missing link.
    """
    memory = memory or MemoryModel()
    tuning = tuning or Tuning()
    plan.check()
    _check_shape(plan, shape)
    _check_pool(plan, cluster)
    book = book_of(plan, shape, profiles, memory)
    timer = timer or pipeline_time
    solved = solve_all(plan, shape, cluster, profiles, book, memory, tuning, timer)
    sums = reductions(
        plan,
        shape,
        cluster,
        memory.reduce_bytes * memory.trainable_share,
        slow_down=tuning.reduce_slow_down,
        flat=tuning.flat_sums,
    )
    pipeline_s = max(one.time.total_s for one in solved)
    overlap = Overlap(plan, shape, cluster, profiles, book)
    done = _reduce_ends(solved, sums, overlap, tuning.reduce_overlap)
    optimizer_s = max(cost.optimizer_s for one in solved for cost in one.costs)
    reduce_s = max([pipeline_s, *done.values()]) - pipeline_s
    if plan.shards_optimizer and memory.shares_layers:
        reduce_s += again_s(sums)
    iteration_s = pipeline_s + reduce_s + optimizer_s + tuning.step_s
    if not 0 < pipeline_s <= iteration_s < math.inf:
        raise UserError(
            f"a step of {iteration_s!r} s, {pipeline_s!r} s of them in pipelines, is no prediction",
            hint="a profile or a link holds a time that is zero, negative or no number",
        )
    return Prediction(
        iteration_s=iteration_s,
        pipeline_s=pipeline_s,
        reduce_s=reduce_s,
        optimizer_s=optimizer_s,
        tokens_per_s=plan.tokens_per_step / iteration_s,
        bubble=_bubble(plan, solved, pipeline_s),
        stages=_stages(plan, cluster, solved, sums),
        mfu=mfu(plan, shape, cluster, iteration_s),
        energy_j=energy_j(plan, cluster, iteration_s),
        cost_micro=cost_micro(plan, cluster, iteration_s),
        basis=basis(plan, cluster, profiles),
    )


def _check_shape(plan: TrainPlan, shape: ModelShape) -> None:
    if plan.num_layers != shape.num_layers:
        raise UserError(f"the plan has {plan.num_layers} layers, the model {shape.num_layers}")
    if plan.seq_tokens != shape.seq_tokens:
        raise UserError(
            f"the plan has rows of {plan.seq_tokens} tokens, the model's shape {shape.seq_tokens}"
        )


def _check_pool(plan: TrainPlan, cluster: Cluster) -> None:
    """Raise UserError for a device that the cluster does not have."""
    sizes = {group.name: group.num_devices for group in cluster.groups}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            size = sizes.get(stage.group)
            if size is None:
                cluster.group(stage.group)
            elif stage.first_device + stage.tp > size:
                raise UserError(
                    f"the plan uses device {stage.first_device + stage.tp - 1} of group "
                    f"{stage.group!r}, which has {size}",
                    hint="devices are counted from 0; make a plan for this pool",
                )


def _reduce_ends(
    solved: Sequence[Solved], sums: Sequence[Reduction], overlap: Overlap, share: float
) -> dict[Member, float]:
    """Return when each stage that takes part in a sum is done with all of its own.

    A stage does its sums one after another, the last layers' first, and each waits for the slowest
    of its members. `overlap` lets buckets start while the last backward runs, `share` of it a whole
    sum.
    """
    free: dict[Member, float] = {}
    for reduction in overlap.in_order(sums):
        rows: list[tuple[float, Window]] = []
        for member in reduction.members:
            one, stage = solved[member[0]], member[1]
            early_s = share * one.costs[stage].backward_s
            window = overlap.window(reduction, member, early_s)
            rows.append((one.time.stage_ends_s[stage], window))
        before_s = max(free.get(member, 0.0) for member in reduction.members)
        _, end = span_of(reduction.seconds, rows, before_s)
        free.update(dict.fromkeys(reduction.members, end))
    return free


def _bubble(plan: TrainPlan, solved: Sequence[Solved], pipeline_s: float) -> float:
    busy = 0.0
    for pipeline, one in zip(plan.pipelines, solved, strict=True):
        for stage, cost in zip(pipeline.stages, one.costs, strict=True):
            busy += stage.tp * cost.busy_s * pipeline.micro_batches
    return max(0.0, 1 - busy / (pipeline_s * plan.num_devices))


def _stages(
    plan: TrainPlan,
    cluster: Cluster,
    solved: Sequence[Solved],
    sums: Sequence[Reduction],
) -> tuple[StagePrediction, ...]:
    reduce_s: dict[Member, float] = {}
    for reduction in sums:
        for member in reduction.members:
            reduce_s[member] = reduce_s.get(member, 0.0) + reduction.seconds
    limits = {group.name: group.memory_bytes for group in cluster.groups}
    found: list[StagePrediction] = []
    for p, (pipeline, one) in enumerate(zip(plan.pipelines, solved, strict=True)):
        crossings = [sum(hop) for hop in one.hops]
        for s, (stage, cost) in enumerate(zip(pipeline.stages, one.costs, strict=True)):
            near = sum(crossings[max(s - 1, 0) : s + 1])
            found.append(
                StagePrediction(
                    pipeline=p,
                    stage=s,
                    busy_s=cost.busy_s * pipeline.micro_batches,
                    send_s=near * pipeline.micro_batches * len(stage.chunks),
                    reduce_s=reduce_s.get((p, s), 0.0),
                    optimizer_s=cost.optimizer_s,
                    memory_bytes=one.memory_bytes[s],
                    memory_limit_bytes=limits[stage.group],
                )
            )
    return tuple(found)
