"""What a plan will do, pass by pass. Start at `simulate_plan`.

The same numbers as `predict`, from the event simulator instead of a closed form, and the timeline
that they come from. Each different pipeline is simulated once. Then every stage sums its gradients
with the others that hold its layers, which waits for the slowest of them, and the optimizer runs.
Knows no two transfers that share a wire, except those of one pair of stages, and no noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mxn.errors import ConfigError
from mxn.train.plan.actions import Order, stored_peak
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.events import Timeline, simulate
from mxn.train.plan.memory import MemoryModel, flight_bytes, stage_parts
from mxn.train.plan.order_check import validate
from mxn.train.plan.overlap import Overlap, Window, span_of
from mxn.train.plan.pass_times import PassTimes
from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.prediction import Prediction, StagePrediction
from mxn.train.plan.profile import Profiles
from mxn.train.plan.reduction import Member, Reduction, again_s, reductions
from mxn.train.plan.schedules import order
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.times import PipelineTimes
from mxn.train.plan.tuning import Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One simulated step. `timelines` are of the different pipelines, `kinds` tells which is whose.

    `sums` are the gradient sums of each (pipeline, stage), as (start, end) in seconds. `chips` are
    those of the groups. `picture` draws it.
    """

    plan: TrainPlan
    chips: Mapping[str, str]
    prediction: Prediction
    timelines: tuple[Timeline, ...]
    kinds: tuple[int, ...]
    sums: Mapping[Member, Sequence[tuple[float, float]]]

    def timeline(self, pipeline: int) -> Timeline:
        return self.timelines[self.kinds[pipeline]]


def simulate_plan(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    tuning: Tuning | None = None,
    orders: Mapping[int, Order] | None = None,
) -> Simulation:
    """Return one step of `plan`, simulated; the prediction is of the kind that `predict` gives.

    `orders` are one's own, by the number of the pipeline; they must fit its stages, chunks and
    micro-batches.

    Raises: UserError as `predict` does; ConfigError for an order that does not fit or never ends.
    """
    memory, tuning = memory or MemoryModel(), tuning or Tuning()
    base = predict(plan, shape, cluster, profiles, memory=memory, tuning=tuning)
    maker = PassTimes(plan, shape, cluster, profiles, memory, tuning)
    known: dict[tuple[PipelineTimes, Order], int] = {}
    lines: list[Timeline] = []
    kinds: list[int] = []
    for number, pipeline in enumerate(plan.pipelines):
        rows = _order_of(plan, pipeline, (orders or {}).get(number))
        key = (maker.times(pipeline, number), rows)
        if key not in known:
            known[key] = len(lines)
            lines.append(simulate(rows, key[0], late_sends=tuning.late_sends))
        kinds.append(known[key])
    own = [lines[kind] for kind in kinds]
    wanted = reductions(
        plan,
        shape,
        cluster,
        memory.reduce_bytes * memory.trainable_share,
        slow_down=tuning.reduce_slow_down,
        flat=tuning.flat_sums,
    )
    overlap = Overlap(plan, shape, cluster, profiles, maker.book)
    sums = _sums(wanted, overlap, tuning, own)
    given_s = again_s(wanted) if plan.shards_optimizer and memory.shares_layers else 0.0
    prediction = _prediction(plan, base, tuning, own, sums, given_s, maker, profiles, memory)
    return Simulation(
        plan=plan,
        chips={group.name: group.chip for group in cluster.groups},
        prediction=prediction,
        timelines=tuple(lines),
        kinds=tuple(kinds),
        sums=sums,
    )


def pipeline_times(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    tuning: Tuning | None = None,
) -> list[PipelineTimes]:
    """Return the seconds of one micro-batch through each pipeline. Raises: as `simulate_plan`."""
    maker = PassTimes(plan, shape, cluster, profiles, MemoryModel(), tuning or Tuning())
    return [maker.times(pipeline, number) for number, pipeline in enumerate(plan.pipelines)]


def _order_of(plan: TrainPlan, pipeline: Pipeline, own: Order | None) -> Order:
    num_stages, num_chunks = len(pipeline.stages), len(pipeline.stages[0].chunks)
    if own is None:
        return order(
            plan.schedule,
            num_stages,
            num_chunks,
            pipeline.micro_batches,
            extra_warmup=pipeline.extra_warmup or 0,
        )
    if len(own) != num_stages:
        raise ConfigError(f"an order of {len(own)} stages for a pipeline of {num_stages}")
    validate(own, num_chunks=num_chunks, num_micro_batches=pipeline.micro_batches)
    return own


def _sums(
    sums: Sequence[Reduction], overlap: Overlap, tuning: Tuning, lines: Sequence[Timeline]
) -> dict[Member, list[tuple[float, float]]]:
    """Return when each stage sums its gradients.

    One sum after another, the last layers first; each begins when the last of its members is there,
    or its first bucket on all of them.
    """
    spans: dict[Member, list[tuple[float, float]]] = {}
    for one in overlap.in_order(sums):
        rows: list[tuple[float, Window]] = []
        before_s = 0.0
        for member in one.members:
            line, stage = lines[member[0]], member[1]
            ends, starts = line.ends_s[stage], line.starts_s[stage]
            early_s = tuning.reduce_overlap * (ends[-1] - starts[-1])
            is_whole = line.order[stage][-1].kind == "B"  # no weight half that comes last
            window = overlap.window(one, member, early_s) if is_whole else ((early_s, 1.0),)
            rows.append((ends[-1], window))
            if member in spans:
                before_s = max(before_s, spans[member][-1][1])
        span = span_of(one.seconds, rows, before_s)
        for member in one.members:
            spans.setdefault(member, []).append(span)
    return spans


def _prediction(
    plan: TrainPlan,
    base: Prediction,
    tuning: Tuning,
    lines: Sequence[Timeline],
    sums: Mapping[Member, Sequence[tuple[float, float]]],
    given_s: float,
    maker: PassTimes,
    profiles: Profiles,
    memory: MemoryModel,
) -> Prediction:
    """Return `base` with everything replaced that the simulation knows better."""
    pipeline_s = max(line.makespan_s for line in lines)
    summed_s = max([pipeline_s, *(spans[-1][1] for spans in sums.values())])
    reduce_s = summed_s - pipeline_s + given_s
    iteration_s = pipeline_s + reduce_s + base.optimizer_s + tuning.step_s
    slower = iteration_s / base.iteration_s
    busy = sum(
        stage.tp * line.busy_s[number]
        for pipeline, line in zip(plan.pipelines, lines, strict=True)
        for number, stage in enumerate(pipeline.stages)
    )
    return replace(
        base,
        iteration_s=iteration_s,
        pipeline_s=pipeline_s,
        reduce_s=reduce_s,
        tokens_per_s=plan.tokens_per_step / iteration_s,
        bubble=1 - busy / (pipeline_s * plan.num_devices),
        stages=tuple(_stage(plan, row, lines, maker, profiles, memory) for row in base.stages),
        mfu=None if base.mfu is None else base.mfu / slower,
        energy_j=None if base.energy_j is None else base.energy_j * slower,
        cost_micro=None if base.cost_micro is None else base.cost_micro * slower,
    )


def _stage(
    plan: TrainPlan,
    row: StagePrediction,
    lines: Sequence[Timeline],
    maker: PassTimes,
    profiles: Profiles,
    memory: MemoryModel,
) -> StagePrediction:
    line, pipeline = lines[row.pipeline], plan.pipelines[row.pipeline]
    stage = pipeline.stages[row.stage]
    costs, whole = maker.costs(pipeline, row.stage), maker.whole(stage)
    profile = profiles[maker.chip(stage.group)]
    model = profile.memory or memory
    flight = [
        flight_bytes(cost.kept_bytes, cost.in_bytes, cost.out_bytes, stage.recompute, model)
        for cost in costs
    ]
    if len(costs) == 1:
        kept = line.stored_peak[row.stage] * flight[0]
    else:
        kept = stored_peak(line.order[row.stage], flight)
    return replace(
        row,
        busy_s=line.busy_s[row.stage],
        send_s=line.sending_s[row.stage],
        memory_bytes=stage_parts(
            params=whole.params,
            owned_params=whole.owned_params,
            kept_per_micro_batch=kept,
            working_bytes=whole.working_bytes,
            micro_batches_kept=1,
            model=model,
            framework_bytes=profile.framework_bytes,
            message_bytes=whole.message_bytes,
            summed_params=whole.summed_params,
        ).total,
    )
