"""The sum of gradients over pipelines, layer by layer. Start at `reductions`.

A run of layers that the same stages hold is one sum. Pipelines may cut the model differently, so a
stage can take part in several. Knows nothing of when a sum starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.experts import held_params
from mxn.train.plan.links import ring_s, slowest
from mxn.train.plan.plan import Chunk, Stage, TrainPlan
from mxn.train.plan.shape import ModelShape

Member = tuple[int, int]
"""Pipeline and stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """One sum: who takes part, and the seconds that it takes from when the last one is ready."""

    members: tuple[Member, ...]
    num_bytes: float  # on the device that brings most
    seconds: float
    exact_s: float  # the same bytes where no link narrows them
    layers: tuple[int, int] | None = None  # first and end; None: a tied matrix


def reductions(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    reduce_bytes: float,
    *,
    slow_down: float = 1.0,
    flat: bool = False,
) -> list[Reduction]:
    """Return all sums of a step, in the order of the layers; none when there is one pipeline.

    `reduce_bytes` is per parameter that is trained; `flat` makes one ring over all pipelines where
    the default sums inside each group first. Raises: UserError for a link that is missing.
    """
    found = [] if len(plan.pipelines) < 2 else _by_layers(plan, shape, cluster, reduce_bytes, flat)
    if shape.is_tied:
        found += _tied(plan, shape, cluster, reduce_bytes)
    return [replace(r, seconds=r.seconds * slow_down, exact_s=r.exact_s * slow_down) for r in found]


def again_s(sums: Sequence[Reduction]) -> float:
    """Return the seconds in which owners of layers give the new weights to the others.

    The runner sums them with zeros, bucket by bucket, as it does gradients but never narrowed;
    tied matrices are updated by each holder. As long as for the stage that takes part in most.
    """
    spent: dict[Member, float] = {}
    for one in sums:
        if len({pipeline for pipeline, _ in one.members}) > 1:
            for member in one.members:
                spent[member] = spent.get(member, 0.0) + one.exact_s
    return max(spent.values(), default=0.0)


def _by_layers(
    plan: TrainPlan, shape: ModelShape, cluster: Cluster, reduce_bytes: float, flat: bool
) -> list[Reduction]:
    cuts = [tuple(stage.chunks for stage in pipeline.stages) for pipeline in plan.pipelines]
    rows = {cut: _holder_of(cut, plan.num_layers) for cut in set(cuts)}
    holders = [rows[cut] for cut in cuts]
    starts = sorted({0} | {at for row in rows.values() for at in _changes(row)})
    known: dict[object, tuple[float, float]] = {}
    found: list[Reduction] = []
    for first, end in pairwise([*starts, plan.num_layers]):
        # Shared-out experts are summed over fewer pipelines; their part is taken as over all.
        members = tuple((p, row[first]) for p, row in enumerate(holders))
        stages = [plan.pipelines[p].stages[s] for p, s in members]
        tps = {stage.tp for stage in stages}
        tp = tps.pop() if len(tps) == 1 else 1  # widths differ: whole tensors are summed
        params = sum(
            layer.params_on(tp, held_params(layer, plan.expert_parallel))
            for layer in shape.layers[first:end]
        )
        if shape.is_tied and end - first == plan.num_layers:
            params -= shape.layers[0].params_on(tp)  # embedding and head are one matrix everywhere
        num_bytes = params * reduce_bytes
        key = (num_bytes, tuple((stage.group, stage.first_device) for stage in stages))
        if key not in known:
            known[key] = _both_s(stages, cluster, num_bytes, flat=flat)
        found.append(_reduction(members, num_bytes, known[key], (first, end)))
    return found


def _holder_of(cut: Sequence[Sequence[Chunk]], num_layers: int) -> list[int]:
    """Return the stage of each layer."""
    row = [0] * num_layers
    for number, chunks in enumerate(cut):
        for chunk in chunks:
            row[chunk.first : chunk.end] = [number] * chunk.num_layers
    return row


def _changes(row: Sequence[int]) -> list[int]:
    return [at for at in range(1, len(row)) if row[at] != row[at - 1]]


def _tied(
    plan: TrainPlan, shape: ModelShape, cluster: Cluster, reduce_bytes: float
) -> list[Reduction]:
    """Return the exchange of a tied matrix's gradient between first and last stage."""
    found: list[Reduction] = []
    for number, pipeline in enumerate(plan.pipelines):
        rows = _holder_of([stage.chunks for stage in pipeline.stages], plan.num_layers)
        if rows[0] == rows[-1]:
            continue
        pair = [pipeline.stages[rows[0]], pipeline.stages[rows[-1]]]
        num_bytes = shape.layers[0].params_on(min(stage.tp for stage in pair)) * reduce_bytes
        members = ((number, rows[0]), (number, rows[-1]))
        found.append(_reduction(members, num_bytes, _both_s(pair, cluster, num_bytes)))
    return found


def _reduction(
    members: tuple[Member, ...],
    num_bytes: float,
    both_s: tuple[float, float],
    layers: tuple[int, int] | None = None,
) -> Reduction:
    return Reduction(
        members=members, num_bytes=num_bytes, seconds=both_s[0], exact_s=both_s[1], layers=layers
    )


def _both_s(
    stages: Sequence[Stage], cluster: Cluster, num_bytes: float, *, flat: bool = False
) -> tuple[float, float]:
    """Return the seconds of a sum as links carry float32, and of one that is exact."""
    seconds = sum_s(stages, cluster, num_bytes, flat=flat)
    if not cluster.narrows_float32:
        return seconds, seconds
    return seconds, sum_s(stages, cluster, num_bytes, flat=flat, is_exact=True)


def sum_s(
    stages: Sequence[Stage],
    cluster: Cluster,
    num_bytes: float,
    *,
    flat: bool = False,
    is_exact: bool = False,
) -> float:
    """Return the seconds to sum `num_bytes` over `stages`: inside each group, then between groups.

    One device of each stage takes part; the devices of a tensor-parallel stage sum their parts at
    the same time, on links of their own. `flat`: one ring over all, as slow as its slowest link.
    Sums are of float32, which links may carry narrower; not where `is_exact`.
    """
    narrows = not is_exact
    members = Counter(stage.group for stage in stages)
    inner = [
        (
            count,
            _inner_link(cluster, name, [s for s in stages if s.group == name], num_bytes, narrows),
        )
        for name, count in members.items()
        if count > 1
    ]
    outer = _outer_links(stages, cluster, list(members))
    if flat:
        links = [*outer, *(link for _, link in inner)]
        link = slowest(links, num_bytes / len(stages), is_float32=narrows)
        if link is None:
            return 0.0
        return ring_s(len(stages), num_bytes, link, is_float32=narrows)
    within = max(
        (ring_s(count, num_bytes, link, is_float32=narrows) for count, link in inner), default=0.0
    )
    link = slowest(outer, num_bytes / len(members), is_float32=narrows)
    if link is None:
        return within
    return within + ring_s(len(members), num_bytes, link, is_float32=narrows)


def _outer_links(stages: Sequence[Stage], cluster: Cluster, names: Sequence[str]) -> list[Link]:
    """Return the links of a ring over the first device of each group; none for one group."""
    if len(names) < 2:
        return []
    first = {stage.group: stage.first_device for stage in reversed(stages)}
    after = [*names[1:], names[0]] if len(names) > 2 else names[1:]
    return [cluster.link(a, first[a], b, first[b]) for a, b in zip(names, after, strict=False)]


def _inner_link(
    cluster: Cluster, name: str, stages: Sequence[Stage], num_bytes: float, narrows: bool
) -> Link:
    """Return the slowest link of a ring over the devices of one group."""
    group = cluster.group(name)
    nodes = {group.node_of(stage.first_device) for stage in stages}
    alone = len(nodes) == 1
    links = [group.node_link] if alone else [group.group_link]
    if not alone and len(nodes) < len(stages):
        links.append(group.node_link)
    chosen = slowest(links, num_bytes / len(stages), is_float32=narrows)
    assert chosen is not None
    return chosen
