"""What ranks know of a step that was done. Knows no torch. Start at `RankStep`."""

from __future__ import annotations

from dataclasses import dataclass

from mxn.train.run.placement import Placement
from mxn.train.run.rebalance import Counts, Load
from mxn.train.run.single import StepLog


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """What a rank's thread did in a step, in seconds."""

    busy_s: float  # computing, as far as the host can tell
    waited_s: float  # for neighbours of the pipeline
    reduce_s: float  # for sums of gradients, behind the last backward pass and where they begin


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """A step; the same on all ranks but for `log.seconds` and `optimizer_s`."""

    log: StepLog
    flags: int  # what ranks said with this step, or-ed together
    times: tuple[RankTimes, ...]  # by rank
    counts: Counts  # micro-batches that each pipeline was to do
    done: Counts  # and did: others where some are open
    step_s: float  # of rank 0's step before this one; 0 for the first
    optimizer_s: float


def loads_of(placement: Placement, told: RankStep) -> list[Load]:
    """Return what each pipeline took in one step, by the times of its ranks.

    Where a pipeline did more or fewer micro-batches than it was to do: what those would have taken.
    """
    own: list[list[RankTimes]] = [[] for _ in placement.plan.pipelines]
    for place, spent in zip(placement.places, told.times, strict=True):
        own[place.pipeline].append(spent)
    return [
        Load(
            total_s=count / done * max(rank.busy_s + rank.waited_s for rank in ranks),
            busy_s=count / done * max(rank.busy_s for rank in ranks),
        )
        for ranks, count, done in zip(own, told.counts, told.done, strict=True)
    ]
