"""What a plan will do, in closed form. Start at `predict`.

`predict(plan, shape, cluster, profiles, memory=MemoryModel()) -> Prediction` is the one call that
planner, commands and tests share. It adds up profiled layer times for each different pipeline once,
so a plan over a thousand devices takes milliseconds. It does not know contention between transfers
that share a wire, nor noise, nor what extra warm-up hides (only what it stores); the event
simulator (`simulate`) replaces its closed form of a pipeline where schedules are uneven.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mxn.errors import UserError
from mxn.train.plan.closed import PipelineTime, pipeline_time
from mxn.train.plan.cluster import Cluster, DeviceGroup
from mxn.train.plan.costs import CostBook, StageCost
from mxn.train.plan.experts import exchange_s
from mxn.train.plan.memory import MemoryModel, in_flight, stage_bytes
from mxn.train.plan.plan import Pipeline, Schedule, TrainPlan
from mxn.train.plan.prediction import Prediction, StagePrediction
from mxn.train.plan.profile import Profiles
from mxn.train.plan.reduction import Member, Reduction, reductions
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.totals import basis, cost_micro, energy_j, mfu


class Timer(Protocol):
    """Times one pipeline; `closed.pipeline_time` is one."""

    def __call__(
        self,
        stages: Sequence[StageCost],
        hops: Sequence[tuple[float, float]],
        micro_batches: int,
        schedule: Schedule,
        *,
        chunks: int,
        blocks: bool,
        late_sends: bool,
    ) -> PipelineTime: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What profiles and links leave out. The default adds nothing."""

    hop_slow_down: float = 1.0  # of transfers between stages
    reduce_slow_down: float = 1.0  # of gradient sums
    hops_block: bool = False  # both ends stand still while a transfer runs
    hop_copies: bool = False  # each tensor-parallel device sends the whole activation
    flow_bytes_per_s: float = math.inf  # of one pair of devices; while it lasts both are held
    late_sends: bool = False  # an activation leaves only after the gradient that is due has come
    flat_sums: bool = False  # one ring over all pipelines instead of one in each group
    reduce_overlap: float = 0.0  # share of the last backward that hides a stage's gradient sums
    step_s: float = 0.0  # of a step, whatever it does: loader, optimizer launch, loss reading


@dataclass(frozen=True, slots=True)
class _Solved:
    """One kind of pipeline: what its copies share."""

    costs: tuple[StageCost, ...]
    hops: tuple[tuple[float, float], ...]
    time: PipelineTime
    memory_bytes: tuple[float, ...]


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
    other pipelines (later stages start earlier, so part of it is hidden), then its optimizer runs.
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
    solved = _solve_all(plan, shape, cluster, profiles, memory, tuning, timer or pipeline_time)
    sums = reductions(
        plan,
        shape,
        cluster,
        memory.reduce_bytes * memory.trainable_share,
        slow_down=tuning.reduce_slow_down,
        flat=tuning.flat_sums,
    )
    pipeline_s = max(one.time.total_s for one in solved)
    done = _reduce_ends(solved, sums, tuning.reduce_overlap)
    shards = len(plan.pipelines) if plan.shards_optimizer else 1
    optimizer_s = max(cost.optimizer_s for one in solved for cost in one.costs) / shards
    reduce_s = max([pipeline_s, *done.values()]) - pipeline_s
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
        stages=_stages(plan, cluster, solved, sums, shards),
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


def _solve_all(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    memory: MemoryModel,
    tuning: Tuning,
    timer: Timer,
) -> list[_Solved]:
    """Return one entry per pipeline; pipelines that are alike share it."""
    book = CostBook(shape, profiles, plan.micro_batch, expert_parallel=plan.expert_parallel)
    groups = {group.name: group for group in cluster.groups}
    known: dict[Hashable, _Solved] = {}
    rows: list[_Solved] = []
    for number, pipeline in enumerate(plan.pipelines):
        away = tuple(exchange_s(plan, number, s, shape, cluster) for s in pipeline.stages)
        key = (_likeness(pipeline, groups, cluster), away)
        if key not in known:
            known[key] = _solve(
                plan, pipeline, away, shape, cluster, book, profiles, memory, tuning, timer
            )
        rows.append(known[key])
    return rows


def _likeness(
    pipeline: Pipeline, groups: dict[str, DeviceGroup], cluster: Cluster
) -> tuple[Hashable, ...]:
    """Return what decides a pipeline's time: its stages and whether neighbours share a node."""
    stages = tuple((s.group, s.chunks, s.tp, s.recompute) for s in pipeline.stages)
    near: list[bool] = []
    for a, b in zip(pipeline.stages, pipeline.stages[1:], strict=False):
        group = groups.get(a.group) or cluster.group(a.group)
        same = a.group == b.group
        near.append(same and group.node_of(a.first_device) == group.node_of(b.first_device))
    return stages, tuple(near), pipeline.micro_batches, pipeline.extra_warmup


def _solve(
    plan: TrainPlan,
    pipeline: Pipeline,
    exchanges_s: Sequence[float],
    shape: ModelShape,
    cluster: Cluster,
    book: CostBook,
    profiles: Profiles,
    memory: MemoryModel,
    tuning: Tuning,
    timer: Timer,
) -> _Solved:
    chips = [cluster.group(stage.group).chip for stage in pipeline.stages]
    costs = tuple(
        book.stage(chip, stage) for chip, stage in zip(chips, pipeline.stages, strict=True)
    )
    hop_bytes = _hop_bytes(plan, pipeline, shape, tuning)
    hops = _hops(pipeline, hop_bytes, cluster, tuning)
    chunks = len(pipeline.stages[0].chunks)
    time = timer(
        _with_held_time(costs, exchanges_s, hop_bytes, chunks, tuning),
        hops,
        pipeline.micro_batches,
        plan.schedule,
        chunks=chunks,
        blocks=tuning.hops_block,
        late_sends=tuning.late_sends,
    )
    size = len(costs)
    shards = len(plan.pipelines) if plan.shards_optimizer else 1
    taken = tuple(
        stage_bytes(
            params=cost.params,
            kept_per_micro_batch=cost.kept_bytes,
            working_bytes=cost.working_bytes,
            micro_batches_kept=in_flight(
                plan.schedule, s, size, pipeline.micro_batches, chunks, pipeline.extra_warmup
            ),
            model=memory,
            framework_bytes=profiles[chips[s]].framework_bytes,
            optimizer_shards=shards,
        )
        for s, cost in enumerate(costs)
    )
    return _Solved(costs, hops, time, taken)


def _with_held_time(
    costs: Sequence[StageCost],
    exchanges_s: Sequence[float],
    hop_bytes: Sequence[float],
    chunks: int,
    tuning: Tuning,
) -> list[StageCost]:
    """Return `costs` with the time each way of expert exchanges and of flows that hold it."""
    held = [num_bytes * chunks / tuning.flow_bytes_per_s for num_bytes in hop_bytes]
    near = [sum(held[max(s - 1, 0) : s + 1]) + away for s, away in enumerate(exchanges_s)]
    return [
        replace(cost, forward_s=cost.forward_s + extra, backward_s=cost.backward_s + extra)
        for cost, extra in zip(costs, near, strict=True)
    ]


def _hop_bytes(
    plan: TrainPlan, pipeline: Pipeline, shape: ModelShape, tuning: Tuning
) -> tuple[float, ...]:
    """Return the bytes that one device sends over each border, one way."""
    tokens = plan.micro_batch * plan.seq_tokens
    return tuple(
        shape.layers[a.chunks[0].end - 1].output_bytes
        * tokens
        / (1 if tuning.hop_copies else min(a.tp, b.tp))
        for a, b in zip(pipeline.stages, pipeline.stages[1:], strict=False)
    )


def _hops(
    pipeline: Pipeline, hop_bytes: Sequence[float], cluster: Cluster, tuning: Tuning
) -> tuple[tuple[float, float], ...]:
    """Return the seconds over each border, there and back."""
    hops: list[tuple[float, float]] = []
    for a, b, num_bytes in zip(pipeline.stages, pipeline.stages[1:], hop_bytes, strict=False):
        link = cluster.link(a.group, a.first_device, b.group, b.first_device)
        seconds = link.transfer_s(num_bytes) * tuning.hop_slow_down
        hops.append((seconds, seconds))
    return tuple(hops)


def _reduce_ends(
    solved: Sequence[_Solved], sums: Sequence[Reduction], overlap: float
) -> dict[Member, float]:
    """Return when each stage that takes part in a sum is done with all of its own.

    A stage does its sums one after another, the last layers' first, and each waits for the slowest
    of its members. `overlap` lets the sums start while the last backward runs.
    """
    free: dict[Member, float] = {}
    for reduction in reversed(sums):
        starts: list[float] = []
        for member in reduction.members:
            one, stage = solved[member[0]], member[1]
            early = overlap * one.costs[stage].backward_s
            ready = one.time.stage_ends_s[stage]
            starts.append(max(free.get(member, 0.0), ready - early))
        end = max(starts) + reduction.seconds
        free.update(dict.fromkeys(reduction.members, end))
    return free


def _bubble(plan: TrainPlan, solved: Sequence[_Solved], pipeline_s: float) -> float:
    busy = 0.0
    for pipeline, one in zip(plan.pipelines, solved, strict=True):
        for stage, cost in zip(pipeline.stages, one.costs, strict=True):
            busy += stage.tp * cost.busy_s * pipeline.micro_batches
    return max(0.0, 1 - busy / (pipeline_s * plan.num_devices))


def _stages(
    plan: TrainPlan,
    cluster: Cluster,
    solved: Sequence[_Solved],
    sums: Sequence[Reduction],
    shards: int,
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
                    optimizer_s=cost.optimizer_s / shards,
                    memory_bytes=one.memory_bytes[s],
                    memory_limit_bytes=limits[stage.group],
                )
            )
    return tuple(found)
