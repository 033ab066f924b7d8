"""Small models, chips and pools for tests of the planner; figures invented."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise, product

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape

TINY_MEMORY = MemoryModel(weight_bytes=1, grad_bytes=1, optimizer_bytes=2, reduce_bytes=1)


def model(num_blocks: int, *, params: int = 1000, head: float = 1.0) -> ModelShape:
    """A block takes 1 s forward on a chip of speed 1, the head `head`, the embedding 0.1 s."""

    def layer(kind: str, work: float, size: int) -> LayerShape:
        return LayerShape(
            kind=kind, params=size, forward_flop=work, activation_bytes=10.0, output_bytes=1.0
        )

    block = layer("block", 1.0, params)
    row = (layer("embedding", 0.1, params), *[block] * num_blocks, layer("head", head, params))
    return ModelShape(name="tiny", layers=row, seq_tokens=10)


def chip(
    name: str,
    speed: float,
    shape: ModelShape,
    *,
    micro_batches: Iterable[int] = (1,),
    tps: Iterable[int] = (1,),
) -> ChipProfile:
    """A chip that does `speed` blocks a second, and loses a tenth to each doubling of `tp`."""
    costs = {}
    for layer, rows, tp in product(set(shape.layers), micro_batches, tps):
        forward = layer.forward_flop * rows / (speed * tp**0.85)
        costs[layer.kind, rows, tp] = LayerCost(
            forward_s=forward, backward_s=2 * forward, optimizer_s=0.01 / tp
        )
    return ChipProfile(chip=name, costs=costs)


def link(bytes_per_s: float, latency_s: float = 0.0) -> Link:
    return Link(latency_s=latency_s, bytes_per_s=bytes_per_s)


def pool(
    sizes: dict[str, int],
    *,
    memory: dict[str, int] | int = 10**9,
    between: float = 1e6,
    inside: float = 1e7,
    per_node: int = 8,
) -> Cluster:
    """Groups named as their chips."""
    groups = tuple(
        DeviceGroup(
            name=name,
            chip=name,
            num_devices=num,
            devices_per_node=min(per_node, num),
            memory_bytes=memory if isinstance(memory, int) else memory[name],
            node_link=link(inside),
            group_link=link(inside / 10),
        )
        for name, num in sizes.items()
    )
    pairs = combinations(sizes, 2)
    return Cluster(groups=groups, links={pair: link(between) for pair in pairs})


def every_plan(shape: ModelShape, cluster: Cluster, rows: int) -> Iterator[TrainPlan]:
    """All 1F1B plans of single devices, without recomputation: for a few layers and devices."""
    groups = [group.name for group in cluster.groups]
    most = {group.name: group.num_devices for group in cluster.groups}
    lines = [
        tuple(zip(order, pairwise(bounds), strict=True))
        for size in range(1, cluster.num_devices + 1)
        for order in product(groups, repeat=size)
        if all(order.count(name) <= most[name] for name in groups)
        for inner in combinations(range(1, shape.num_layers), size - 1)
        for bounds in [(0, *inner, shape.num_layers)]
    ]
    for chosen in _sets(lines, most):
        for shares in _splits(len(chosen), rows):
            yield _plan_of(shape, chosen, shares)


def _sets(lines: list, most: dict[str, int], start: int = 0) -> Iterator[list]:
    for number in range(start, len(lines)):
        line = lines[number]
        left = dict(most)
        for name, _ in line:
            left[name] -= 1
        if min(left.values()) < 0:
            continue
        yield [line]
        for rest in _sets(lines, left, number):
            yield [line, *rest]


def _splits(num: int, total: int) -> Iterator[tuple[int, ...]]:
    if num == 1:
        yield (total,)
        return
    for first in range(1, total - num + 2):
        for rest in _splits(num - 1, total - first):
            yield (first, *rest)


def _plan_of(shape: ModelShape, chosen: list, shares: tuple[int, ...]) -> TrainPlan:
    taken: dict[str, int] = {}
    pipelines = []
    for line, share in zip(chosen, shares, strict=True):
        stages = []
        for name, (first, end) in line:
            number = taken.get(name, 0)
            taken[name] = number + 1
            stages.append(
                Stage(group=name, first_device=number, chunks=(Chunk(first=first, end=end),))
            )
        pipelines.append(Pipeline(stages=tuple(stages), micro_batches=share))
    return TrainPlan(
        model=shape.name, num_layers=shape.num_layers, seq_tokens=shape.seq_tokens,
        micro_batch=1, pipelines=tuple(pipelines),
    )  # fmt: skip
