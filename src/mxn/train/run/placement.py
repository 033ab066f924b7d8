"""Which rank does what of a plan: ranks in plan order, their neighbours, who holds a layer. Pure.

Pipelines in order, in each its stages in order. Chunk c of stage s is part c·S + s of the model;
parts are what messages go between. Start at `Placement`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mxn.errors import UnsupportedError
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Of one rank: its pipeline and its stage there."""

    rank: int
    pipeline: int
    stage: int


class Placement:
    """A plan with ranks. Raises UnsupportedError for what the trainer cannot run."""

    def __init__(self, plan: TrainPlan) -> None:
        plan.check()
        _refuse(plan)
        self.plan = plan
        self.places: list[Place] = []
        for number, pipeline in enumerate(plan.pipelines):
            for stage in range(len(pipeline.stages)):
                self.places.append(Place(rank=len(self.places), pipeline=number, stage=stage))
        self._rank_of = {(place.pipeline, place.stage): place.rank for place in self.places}

    @property
    def num_ranks(self) -> int:
        return len(self.places)

    def pipeline_of(self, rank: int) -> Pipeline:
        return self.plan.pipelines[self.places[rank].pipeline]

    def stage_of(self, rank: int) -> Stage:
        return self.pipeline_of(rank).stages[self.places[rank].stage]

    def rank_of_part(self, pipeline: int, part: int) -> int:
        """Return the rank that holds part c·S + s of a pipeline."""
        return self._rank_of[pipeline, part % len(self.plan.pipelines[pipeline].stages)]

    def num_parts(self, pipeline: int) -> int:
        stages = self.plan.pipelines[pipeline].stages
        return len(stages) * len(stages[0].chunks)

    def first_micro_batch(self, pipeline: int) -> int:
        """Return the number, in the step, of the first micro-batch that a pipeline takes."""
        return sum(before.micro_batches for before in self.plan.pipelines[:pipeline])

    def last_rank(self, pipeline: int) -> int:
        """Return the rank that has the head of a pipeline, where losses come out."""
        return self._rank_of[pipeline, len(self.plan.pipelines[pipeline].stages) - 1]

    def holders(self) -> dict[int, list[int]]:
        """Return for each layer the ranks that hold it, one per pipeline, ascending."""
        found: dict[int, list[int]] = {layer: [] for layer in range(self.plan.num_layers)}
        for place in self.places:
            for chunk in self.stage_of(place.rank).chunks:
                for layer in range(chunk.first, chunk.end):
                    found[layer].append(place.rank)
        return found

    def channels(self) -> Iterator[tuple[int, int, str]]:
        """Yield sender, receiver and name of every one-way line, in one order for all ranks."""
        for number in range(len(self.plan.pipelines)):
            for part in range(self.num_parts(number) - 1):
                near = self.rank_of_part(number, part)
                far = self.rank_of_part(number, part + 1)
                if near != far:
                    yield near, far, channel("F", part)
                    yield far, near, channel("B", part)


def channel(kind: str, boundary: int) -> str:
    """Return the name of the line that carries one kind over the boundary behind a part."""
    return f"{kind}{boundary}"


def layers_of(chunks: tuple[Chunk, ...]) -> list[int]:
    return [layer for chunk in chunks for layer in range(chunk.first, chunk.end)]


def _refuse(plan: TrainPlan) -> None:
    if plan.expert_parallel != 1:
        raise UnsupportedError(
            f"expert_parallel {plan.expert_parallel} can be predicted and not yet run",
            hint="plan with expert_parallel = 1",
        )
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            if stage.tp != 1:
                raise UnsupportedError(
                    f"tensor parallelism of {stage.tp} in group {stage.group!r} can be predicted "
                    "and not yet run",
                    hint="plan with tp = 1: pipelines and data parallelism have no such limit",
                )
