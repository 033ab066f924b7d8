"""Drafts become plans: devices get numbers, pipelines their micro-batches, stages recomputation.

Start at `plan_of`. Slots fill the nodes of a group in order, either pipeline by pipeline (its
stages are neighbours) or stage by stage (those that sum gradients are neighbours).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.draft import Draft, Style, Template
from mxn.train.plan.search.shares import split
from mxn.train.plan.search.tables import TableBook, Tables


def plan_of(
    book: TableBook, draft: Draft, rows: int, *, by_stage: bool = False
) -> TrainPlan | None:
    """Return the draft as a plan over `rows` rows per step.

    None when a stage has too few layers for the chunks of the draft's schedule, or pipelines were
    left out that should share experts.
    """
    working = _with_shares(draft, rows // draft.micro_batch)
    if len(working) % draft.experts:
        return None
    shards = len(working) if draft.shards_optimizer else 1
    tables = book.at(draft.micro_batch, shards, draft.experts)
    shape = book.job.shape
    plan = TrainPlan(
        model=shape.name,
        num_layers=shape.num_layers,
        seq_tokens=shape.seq_tokens,
        micro_batch=draft.micro_batch,
        pipelines=_placed(tables, working, by_stage, draft.style),
        shards_optimizer=draft.shards_optimizer and len(working) > 1,
        expert_parallel=draft.experts,
    )
    return with_schedule(plan, draft.style)


def settled(draft: Draft, rows: int) -> Draft:
    """Return the draft with its shares fixed, and without pipelines that get none."""
    working = _with_shares(draft, rows // draft.micro_batch)
    return replace(
        draft,
        lines=tuple((line, 1) for line, _ in working),
        shares=tuple(count for _, count in working),
    )


def with_schedule(plan: TrainPlan, style: Style) -> TrainPlan | None:
    """Return a 1F1B plan under another schedule; None when a stage has too few layers for it."""
    if style.chunks == 1:
        return replace(plan, schedule=style.schedule)
    pipelines: list[Pipeline] = []
    for pipeline in plan.pipelines:
        if min(stage.num_layers for stage in pipeline.stages) < style.chunks:
            return None
        pipelines.append(replace(pipeline, stages=_chunked(pipeline.stages, style.chunks)))
    return replace(plan, schedule=style.schedule, pipelines=tuple(pipelines))


def _chunked(stages: tuple[Stage, ...], num_chunks: int) -> tuple[Stage, ...]:
    """Deal each stage's layers over its chunks as evenly as they go."""
    at = 0
    chunks: dict[int, list[Chunk]] = defaultdict(list)
    for number in range(num_chunks):
        for index, stage in enumerate(stages):
            size, rest = divmod(stage.num_layers, num_chunks)
            end = at + size + (number < rest)
            chunks[index].append(Chunk(first=at, end=end))
            at = end
    return tuple(replace(stage, chunks=tuple(chunks[i])) for i, stage in enumerate(stages))


def _with_shares(draft: Draft, micro_batches: int) -> list[tuple[Template, int]]:
    """Return each pipeline with its micro-batches; one that would get none is left out."""
    templates = [line for line, count in draft.lines for _ in range(count)]
    shares = draft.shares or split([t.pace(draft.style.fill) for t in templates], micro_batches)
    return [(line, n) for line, n in zip(templates, shares, strict=True) if n]


def _placed(
    tables: Tables, working: list[tuple[Template, int]], by_stage: bool, style: Style
) -> tuple[Pipeline, ...]:
    wanted = [(p, s) for p, (line, _) in enumerate(working) for s in range(line.num_stages)]
    if by_stage:
        # Stages that hold like layers sit side by side, wherever their pipelines are cut.
        wanted.sort(key=lambda at: (working[at[0]][0].bounds[at[1]], at))
    taken: dict[str, int] = defaultdict(int)
    first: dict[tuple[int, int], int] = {}
    for p, s in wanted:
        kind = working[p][0].kinds[s]
        first[p, s] = _first_device(tables.job, kind, taken[kind.group])
        taken[kind.group] += 1
    return tuple(
        Pipeline(stages=_stages(tables, line, count, style, p, first), micro_batches=count)
        for p, (line, count) in enumerate(working)
    )


def _first_device(job: Job, kind: Kind, slot: int) -> int:
    group = job.cluster.group(kind.group)
    node, within = divmod(slot, group.devices_per_node // kind.tp)
    return node * group.devices_per_node + within * kind.tp


def _stages(
    tables: Tables,
    line: Template,
    count: int,
    style: Style,
    number: int,
    first: dict[tuple[int, int], int],
) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for s, kind in enumerate(line.kinds):
        run = (line.bounds[s], line.bounds[s + 1])
        in_flight = style.in_flight(s, line.num_stages, count)
        stages.append(
            Stage(
                group=kind.group,
                first_device=first[number, s],
                chunks=(Chunk(first=run[0], end=run[1]),),
                tp=kind.tp,
                recompute=tables.recompute(kind, in_flight, *run),
            )
        )
    return tuple(stages)
