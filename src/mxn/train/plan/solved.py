"""Each different pipeline of a plan: what its stages cost, hold and send. Start at `solve_all`.

Pipelines that are alike are solved once. Knows nothing of sums of gradients, nor of the rest of a
step: `predict` puts those on top.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from mxn.train.plan.closed import PipelineTime
from mxn.train.plan.cluster import Cluster, DeviceGroup
from mxn.train.plan.costs import CostBook, StageCost
from mxn.train.plan.experts import exchange_s
from mxn.train.plan.memory import MemoryModel, Parts, flight_bytes, in_flight, stage_parts
from mxn.train.plan.plan import Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, Profiles
from mxn.train.plan.shape import LayerShape, ModelShape
from mxn.train.plan.tuning import Timer, Tuning


@dataclass(frozen=True, slots=True)
class Solved:
    """One kind of pipeline: what its copies share."""

    costs: tuple[StageCost, ...]
    hops: tuple[tuple[float, float], ...]
    time: PipelineTime
    memory_bytes: tuple[float, ...]


def book_of(
    plan: TrainPlan, shape: ModelShape, profiles: Profiles, memory: MemoryModel
) -> CostBook:
    """Return the costs of layers as `plan` shares them out."""
    return CostBook(
        shape,
        profiles,
        plan.micro_batch,
        expert_parallel=plan.expert_parallel,
        shards=len(plan.pipelines) if plan.shards_optimizer else 1,
        shares_layers=memory.shares_layers,
        uneven_layers=plan.uneven_layers,
    )


def device_bytes(
    stage: Stage, cost: StageCost, kept: float, profile: ChipProfile, memory: MemoryModel
) -> Parts:
    """Return what a device of `stage` holds with `kept` micro-batches in flight."""
    model = profile.memory or memory
    return stage_parts(
        params=cost.params,
        owned_params=cost.owned_params,
        kept_per_micro_batch=flight_bytes(
            cost.kept_bytes, cost.in_bytes, cost.out_bytes, stage.recompute, model
        ),
        working_bytes=cost.working_bytes,
        micro_batches_kept=kept,
        model=model,
        framework_bytes=profile.framework_bytes,
        message_bytes=cost.message_bytes,
        summed_params=cost.summed_params,
    )


def solve_all(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    book: CostBook,
    memory: MemoryModel,
    tuning: Tuning,
    timer: Timer,
) -> list[Solved]:
    """Return one entry per pipeline; pipelines that are alike share it. `book` is `book_of` it."""
    groups = {group.name: group for group in cluster.groups}
    known: dict[Hashable, Solved] = {}
    rows: list[Solved] = []
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
) -> Solved:
    chips = [cluster.group(stage.group).chip for stage in pipeline.stages]
    costs = tuple(
        book.stage(chip, stage) for chip, stage in zip(chips, pipeline.stages, strict=True)
    )
    hop_bytes = _hop_bytes(plan, pipeline, shape, [profiles[chip].width for chip in chips], tuning)
    are_float32 = [profiles[chip].is_float32 for chip in chips]
    hops = _hops(pipeline, hop_bytes, are_float32, cluster, tuning)
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
    taken = tuple(
        device_bytes(
            pipeline.stages[s],
            cost,
            in_flight(
                plan.schedule, s, size, pipeline.micro_batches, chunks, pipeline.extra_warmup
            ),
            profiles[chips[s]],
            memory,
        ).total
        for s, cost in enumerate(costs)
    )
    return Solved(costs, hops, time, taken)


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
    plan: TrainPlan,
    pipeline: Pipeline,
    shape: ModelShape,
    widths: Sequence[float],
    tuning: Tuning,
) -> tuple[float, ...]:
    """Return the bytes that one device sends over each border, one way."""
    tokens = plan.micro_batch * plan.seq_tokens
    pairs = zip(pipeline.stages, pipeline.stages[1:], strict=False)
    return tuple(
        tokens * width * border_bytes(shape.layers[a.chunks[0].end - 1], a, b, tuning)
        for (a, b), width in zip(pairs, widths, strict=False)
    )


def border_bytes(layer: LayerShape, a: Stage, b: Stage, tuning: Tuning) -> float:
    """Return the bytes of a token that one device sends from stage `a` to `b` behind `layer`."""
    return layer.output_bytes if tuning.hop_copies else layer.output_on(min(a.tp, b.tp))


def _hops(
    pipeline: Pipeline,
    hop_bytes: Sequence[float],
    are_float32: Sequence[bool],
    cluster: Cluster,
    tuning: Tuning,
) -> tuple[tuple[float, float], ...]:
    """Return the seconds over each border, there and back, in what the stage before computes in."""
    hops: list[tuple[float, float]] = []
    pairs = zip(pipeline.stages, pipeline.stages[1:], strict=False)
    for (a, b), num_bytes, is_float32 in zip(pairs, hop_bytes, are_float32, strict=False):
        link = cluster.link(a.group, a.first_device, b.group, b.first_device)
        seconds = link.transfer_s(num_bytes, is_float32=is_float32) * tuning.hop_slow_down
        hops.append((seconds, seconds))
    return tuple(hops)
