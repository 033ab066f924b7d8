"""Seconds of a pipeline's passes and hops, from profiles and links. Start at `PassTimes.times`."""

from __future__ import annotations

from dataclasses import replace

from mxn.train.plan.cluster import Cluster
from mxn.train.plan.costs import StageCost
from mxn.train.plan.experts import exchange_s
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import Profiles
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.solved import book_of, border_bytes
from mxn.train.plan.times import Hop, PipelineTimes
from mxn.train.plan.tuning import Tuning


class PassTimes:
    """Makes the seconds of a pipeline's passes and hops from profiles and links."""

    def __init__(
        self,
        plan: TrainPlan,
        shape: ModelShape,
        cluster: Cluster,
        profiles: Profiles,
        memory: MemoryModel,
        tuning: Tuning,
    ) -> None:
        self._plan, self._shape, self._cluster = plan, shape, cluster
        self._profiles, self._tuning = profiles, tuning
        self.book = book_of(plan, shape, profiles, memory)
        self._chips = {group.name: group.chip for group in cluster.groups}
        self._costs: dict[tuple[object, ...], tuple[StageCost, ...]] = {}

    def chip(self, group: str) -> str:
        return self._chips[group]

    def costs(self, pipeline: Pipeline, number: int) -> tuple[StageCost, ...]:
        """Return the costs of a stage, chunk by chunk."""
        stage = pipeline.stages[number]
        key = (stage.group, stage.chunks, stage.tp, stage.recompute)
        if key not in self._costs:
            self._costs[key] = tuple(
                self.book.stage(self.chip(stage.group), replace(stage, chunks=(chunk,)))
                for chunk in stage.chunks
            )
        return self._costs[key]

    def whole(self, stage: Stage) -> StageCost:
        """Return the cost of a stage with all of its chunks."""
        return self.book.stage(self.chip(stage.group), stage)

    def times(self, pipeline: Pipeline, index: int) -> PipelineTimes:
        """Return the seconds of one micro-batch through `pipeline`, the plan's number `index`."""
        size = len(pipeline.stages)
        borders = size * len(pipeline.stages[0].chunks) - 1
        crossed = [self._hop_bytes(pipeline, part) for part in range(borders)]
        held = [0.0, *(count / self._tuning.flow_bytes_per_s for count in crossed), 0.0]
        forward, backward, weight = [], [], []
        for stage in range(size):
            costs = self.costs(pipeline, stage)
            away = exchange_s(
                self._plan, index, pipeline.stages[stage], self._shape, self._cluster
            ) / len(costs)
            near = [
                held[c * size + stage] + held[c * size + stage + 1] + away
                for c in range(len(costs))
            ]
            pairs = list(zip(costs, near, strict=True))
            forward.append(tuple(cost.forward_s + extra for cost, extra in pairs))
            backward.append(tuple(cost.backward_s + extra for cost, extra in pairs))
            weight.append(tuple(cost.weight_s for cost in costs))
        hops = tuple(self._hop(pipeline, part, crossed[part]) for part in range(borders))
        return PipelineTimes(
            forward_s=tuple(forward),
            backward_s=tuple(backward),
            weight_s=tuple(weight),
            forward_hops=hops,
            backward_hops=hops,
        )

    def _hop_bytes(self, pipeline: Pipeline, part: int) -> float:
        """Return the bytes that one device sends over the border behind `part`, one way."""
        size = len(pipeline.stages)
        a, b = pipeline.stages[part % size], pipeline.stages[(part + 1) % size]
        if a is b:
            return 0.0
        layer = self._shape.layers[a.chunks[part // size].end - 1]
        tokens = self._plan.micro_batch * self._plan.seq_tokens
        width = self._profiles[self.chip(a.group)].width
        return tokens * width * border_bytes(layer, a, b, self._tuning)

    def _hop(self, pipeline: Pipeline, part: int, num_bytes: float) -> Hop:
        size = len(pipeline.stages)
        a, b = pipeline.stages[part % size], pipeline.stages[(part + 1) % size]
        if a is b:
            return Hop()
        link = self._cluster.link(a.group, a.first_device, b.group, b.first_device)
        is_float32 = self._profiles[self.chip(a.group)].is_float32
        seconds = link.transfer_s(num_bytes, is_float32=is_float32) * self._tuning.hop_slow_down
        return Hop.blocking(seconds) if self._tuning.hops_block else Hop(seconds)
