"""What a search may choose from, and what it returns. Start at `Limits` and `Found`."""

from __future__ import annotations

from dataclasses import dataclass

from mxn.train.plan.plan import Recompute, Schedule, TrainPlan
from mxn.train.plan.prediction import Prediction
from mxn.train.plan.search.draft import Style


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be chosen. None: whatever the profiles and the pool allow."""

    micro_batches: tuple[int, ...] | None = None  # rows of a micro-batch
    tps: tuple[int, ...] | None = None
    schedules: tuple[Schedule, ...] = ("1f1b", "zero-bubble", "interleaved")
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    max_stages: int | None = None
    max_chunks: int = 4  # of a stage under an interleaved schedule
    may_shard_optimizer: bool = True
    max_expert_parallel: int = 64  # pipelines that share out the experts of a layer
    num_simulated: int = 6  # of the best by prediction
    num_kept: int = 5  # runners-up that are returned

    @property
    def styles(self) -> tuple[Style, ...]:
        """The schedules to look at, 1F1B first if it is allowed."""
        found: list[Style] = []
        for schedule in self.schedules:
            counts = (2, 4) if schedule == "interleaved" else (1,)
            found += [Style(schedule, chunks) for chunks in counts if chunks <= self.max_chunks]
        return tuple(sorted(found, key=lambda style: style.schedule != "1f1b"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that fits, and what it is predicted to do."""

    plan: TrainPlan
    prediction: Prediction
    origin: str  # the kind of plan: "copies of one pipeline", "mix of pipelines", …
    is_simulated: bool = False  # whether the event simulator made `prediction`


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A plan that was looked at and refused."""

    plan: TrainPlan
    origin: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The outcome: the best plan first. `num_looked_at` counts plans that were predicted."""

    best: Candidate
    runners_up: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    num_looked_at: int
    is_exact: bool  # whether each order, cut and set of pipelines was timed in closed form

    @property
    def how(self) -> str:
        """Say how thorough the search was, and no more than that."""
        if self.is_exact:
            return (
                "every order, cut and set of pipelines timed in closed form, gradient sums and "
                "other schedules on the best of them"
            )
        return "guided: another plan may be a few percent quicker"
