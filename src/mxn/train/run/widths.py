"""Which widths of tensor parallelism are worth measuring for a job. Start at `promising_widths`.

A profile of width 1 says what a wider one takes at best: cut parts divided evenly, and the sums on
top. A search with such derived costs names the widths that a good plan might use; those are then
measured, and the plan that is run is made from measured costs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mxn.errors import UnsupportedError
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.links import ring_s
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.planner import find
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.totals import weakest
from mxn.train.run.from_job import open_source
from mxn.train.run.job import Job
from mxn.train.run.measure import Measured
from mxn.train.run.weights import ModelSource
from mxn.train.shapes import layer_kinds

_WIDTHS = (2, 4, 8, 16)
SUMS = 2  # of a block in a team, forward and as many backward, see `net.shard`


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A team that only says how large it is."""

    size: int
    index: int = 0

    def add(self, tensor: Tensor) -> None: ...

    def gather(self, part: Tensor) -> list[Tensor]:
        return [part] * self.size


def promising_widths(job: Job, measured: Measured, limits: Limits) -> tuple[int, ...]:
    """Return the widths above 1 that the best plan uses if they cost what is derived for them."""
    if limits.tps is None:
        return ()
    widths = dividing_widths(open_source(job), max(group.count for group in job.devices))
    if not widths:
        return ()
    profiles = {
        label: with_derived(profile, measured.shape, measured.cluster, widths)
        for label, profile in measured.profiles.items()
    }
    trial = replace(limits, tps=(*limits.tps, *widths), num_simulated=0)
    found = find(
        measured.shape, job.global_batch, measured.cluster, profiles,
        memory=measured.memory, limits=trial,
    )  # fmt: skip
    if found is None:
        return ()
    used = {s.tp for p in found.best.plan.pipelines for s in p.stages}
    return tuple(sorted(used - {*limits.tps}))


def dividing_widths(source: ModelSource, most: int) -> tuple[int, ...]:
    """Return the widths up to `most` that every kind of block can be cut into."""
    kinds = layer_kinds(source.spec)
    layers = {kind: number for number, kind in enumerate(kinds) if kind.startswith("block")}
    return tuple(w for w in _WIDTHS if w <= most and _divides(source, [*layers.values()], w))


def _divides(source: ModelSource, layers: Sequence[int], width: int) -> bool:
    try:
        for layer in layers:
            source.empty_stage(layer, layer + 1, device="meta", team=_Sketch(width))
    except UnsupportedError:
        return False
    return True


def with_derived(
    profile: ChipProfile, shape: ModelShape, cluster: Cluster, widths: Sequence[int]
) -> ChipProfile:
    """Return the profile with costs of wider blocks that it lacks, and the basis `derived` at best.

    At the best: work in equal parts, nothing lost but the sums on the slowest link of these chips.
    """
    links = [g.node_link for g in cluster.groups if g.chip == profile.chip and g.num_devices > 1]
    if not links:
        return profile
    layers = {layer.kind: layer for layer in shape.layers}
    costs = dict(profile.costs)
    for (kind, rows, tp), cost in profile.costs.items():
        for width in widths if tp == 1 and kind in layers else ():
            layer = layers[kind]
            num_bytes = layer.output_bytes * shape.seq_tokens * rows * profile.width
            sums_s = SUMS * max(ring_s(width, num_bytes, link) for link in links)
            costs.setdefault(
                (kind, rows, width),
                _cut(cost, layer.params_on(width) / max(layer.params, 1),
                     layer.kept_on(width) / max(layer.kept_on(1), 1e-9), width, sums_s)
                if layer.is_block
                else cost,
            )  # fmt: skip
    return replace(profile, costs=costs, basis=weakest([profile.basis, "derived"]))


def _cut(cost: LayerCost, held: float, kept: float, width: int, sums_s: float) -> LayerCost:
    bytes_ = None if cost.activation_bytes is None else cost.activation_bytes * kept
    return LayerCost(
        forward_s=cost.forward_s / width + sums_s,
        backward_s=cost.backward_s / width + sums_s,
        weight_s=None if cost.weight_s is None else cost.weight_s / width,
        optimizer_s=cost.optimizer_s * held,
        activation_bytes=bytes_,
    )
