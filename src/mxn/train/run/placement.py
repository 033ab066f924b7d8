"""Which rank does what of a plan: ranks in plan order, their neighbours, who holds a layer. Pure.

Pipelines in order, in each its stages in order, in each its devices: those of one stage are a team
(tensor parallelism). Chunk c of stage s is part c·S + s of the model; parts are what messages go
between. Start at `Placement`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mxn.errors import UnsupportedError
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Of one rank: its pipeline, its stage there, and its number among the stage's ranks."""

    rank: int
    pipeline: int
    stage: int
    index: int = 0


Team = tuple[int, ...]
"""The ranks of a stage, ascending."""


class Placement:
    """A plan with ranks. Raises UnsupportedError for what the trainer cannot run."""

    def __init__(self, plan: TrainPlan) -> None:
        plan.check()
        _refuse(plan)
        self.plan = plan
        self.places: list[Place] = []
        self._teams: dict[tuple[int, int], Team] = {}
        for number, pipeline in enumerate(plan.pipelines):
            for at, stage in enumerate(pipeline.stages):
                first = len(self.places)
                self._teams[number, at] = tuple(range(first, first + stage.tp))
                for index in range(stage.tp):
                    self.places.append(
                        Place(rank=first + index, pipeline=number, stage=at, index=index)
                    )

    @property
    def num_ranks(self) -> int:
        return len(self.places)

    def pipeline_of(self, rank: int) -> Pipeline:
        return self.plan.pipelines[self.places[rank].pipeline]

    def stage_of(self, rank: int) -> Stage:
        return self.pipeline_of(rank).stages[self.places[rank].stage]

    def team_of(self, rank: int) -> Team:
        """Return the ranks that hold the same layers of the same pipeline together."""
        place = self.places[rank]
        return self._teams[place.pipeline, place.stage]

    def all_teams(self) -> list[Team]:
        return list(self._teams.values())

    def team_of_part(self, pipeline: int, part: int) -> Team:
        """Return the ranks that hold part c·S + s of a pipeline."""
        return self._teams[pipeline, part % len(self.plan.pipelines[pipeline].stages)]

    def rank_of_part(self, pipeline: int, part: int) -> int:
        """Return the first rank that holds part c·S + s of a pipeline."""
        return self.team_of_part(pipeline, part)[0]

    def peer(self, rank: int, part: int) -> int | None:
        """Return the rank of a part of the same pipeline that this one exchanges messages with.

        Teams of one size talk rank by rank. Otherwise their first ranks do, and None is returned
        for the others: what comes, the first one gives them.
        """
        place, mine = self.places[rank], self.team_of(rank)
        other = self.team_of_part(place.pipeline, part)
        if len(other) == len(mine):
            return other[place.index]
        return other[0] if place.index == 0 else None

    def num_parts(self, pipeline: int) -> int:
        stages = self.plan.pipelines[pipeline].stages
        return len(stages) * len(stages[0].chunks)

    def first_micro_batch(self, pipeline: int) -> int:
        """Return the number, in the step, of the first micro-batch that a pipeline takes."""
        return sum(before.micro_batches for before in self.plan.pipelines[:pipeline])

    def teams_with(self, layer: int) -> list[Team]:
        """Return the teams that hold a layer, one per pipeline, ascending."""
        return [
            self._teams[number, at]
            for number, pipeline in enumerate(self.plan.pipelines)
            for at, stage in enumerate(pipeline.stages)
            if any(chunk.first <= layer < chunk.end for chunk in stage.chunks)
        ]

    def holders(self, index: int = 0) -> dict[int, list[int]]:
        """Return for each layer one rank of each team that holds it, ascending.

        It is the one with number `index` in its team, or the last one of a smaller team.
        """
        return {
            layer: [team[min(index, len(team) - 1)] for team in self.teams_with(layer)]
            for layer in range(self.plan.num_layers)
        }

    def sharers(self, layers: Iterable[int]) -> list[Team]:
        """Return the sets of ranks that sum their gradients of some layers, each rank in one set.

        Teams of one size sum rank by rank, as those have the same part; others all together.
        """
        teams = sorted({team for layer in layers for team in self.teams_with(layer)})
        if len({len(team) for team in teams}) == 1:
            return list(zip(*teams, strict=True))
        return [tuple(rank for team in teams for rank in team)]

    def channels(self) -> Iterator[tuple[int, int, str]]:
        """Yield sender, receiver and name of every one-way line, in one order for all ranks."""
        for number in range(len(self.plan.pipelines)):
            for part in range(self.num_parts(number) - 1):
                for near in self.team_of_part(number, part):
                    far = self.peer(near, part + 1)
                    if far is not None and near != far:
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
