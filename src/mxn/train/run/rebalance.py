"""Shares micro-batches out among pipelines again, by what the steps of a job measured. Pure.

Profiles are some per cent off, and then the slowest pipeline lets all others wait. Every rank is
told the times of all ranks with each step, so each runs the same `Rebalancer` on the same numbers
and comes to the same counts, without a message. Knows no torch, files or clock. Start at
`Rebalancer.observe`.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mxn.errors import InternalError
from mxn.train.plan.memory import in_flight
from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.plan.search.shares import Pace, finish_s
from mxn.units import format_seconds

Counts = tuple[int, ...]
"""Micro-batches of a step, by pipeline."""

Since = tuple[int, Counts]
"""Counts, and the first step (from 0) that is done with them."""

WARM_STEPS = 2  # behind a start: memory is taken, caches fill
_SETTLING_STEPS = 1  # behind a change
_DRIFT = 0.1  # of a pipeline's pace, beyond which earlier measurements say nothing any more
_REMEMBERED = 20  # decisions for which a measurement is believed
_MOST_SHOWN = 8  # pipelines in a line for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pipeline took for its micro-batches of one step, in seconds."""

    total_s: float  # from the first forward to the last backward pass, without other pipelines
    busy_s: float  # of its busiest rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Other counts, and why. `step` (from 0) is the first that is done with them."""

    step: int
    before: Counts
    after: Counts
    each_s: tuple[float, ...]  # of a micro-batch, by pipeline, measured
    step_s: float  # measured
    predicted_s: float

    def text(self) -> str:
        """Say it to a person, to whom the first step is number 1."""
        if len(self.each_s) > _MOST_SHOWN:
            ends = min(self.each_s), max(self.each_s)
            measured = " to ".join(map(format_seconds, ends))
        else:
            measured = ", ".join(map(format_seconds, self.each_s))
        return (
            f"micro-batches {counts_text(self.before)} -> {counts_text(self.after)} from step "
            f"{self.step + 1} on: measured {measured} for each, step "
            f"{format_seconds(self.step_s)} -> {format_seconds(self.predicted_s)} predicted"
        )


def counts_text(counts: Sequence[int]) -> str:
    return ":".join(map(str, counts))


def counts_of(plan: TrainPlan) -> Counts:
    return tuple(pipeline.micro_batches for pipeline in plan.pipelines)


def with_counts(plan: TrainPlan, counts: Sequence[int], *, is_all: bool = True) -> TrainPlan:
    """Return the plan with other micro-batches for its pipelines, as many in sum (`is_all`).

    Raises: InternalError for counts that are not of this plan.
    """
    is_some = sum(counts) == plan.micro_batches or not is_all
    if len(counts) != len(plan.pipelines) or not is_some or min(counts) < 1:
        raise InternalError(f"counts {tuple(counts)} are none of a plan with {counts_of(plan)}")
    pipelines = tuple(
        replace(pipeline, micro_batches=count)
        for pipeline, count in zip(plan.pipelines, counts, strict=True)
    )
    return replace(plan, pipelines=pipelines)


def same_cut(one: TrainPlan, other: TrainPlan) -> bool:
    """Return whether two plans differ in nothing but the micro-batches of their pipelines."""
    return len(one.pipelines) == len(other.pipelines) and one == replace(
        other,
        pipelines=tuple(
            replace(pipeline, micro_batches=count)
            for pipeline, count in zip(other.pipelines, counts_of(one), strict=True)
        ),
    )


# -- which counts are best ---------------------------------------------------------------------


def share_out(
    paces: Sequence[Pace], total: int, ranges: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Return the counts within `ranges` (least, most) with which the last pipeline ends earliest.

    Each next micro-batch goes to the pipeline that would end first with it, which is optimal
    because time grows with the count.
    Raises: InternalError when no counts within the ranges have the sum `total`.
    """
    counts = [least for least, _ in ranges]
    left = total - sum(counts)
    queue = [
        (pace.time_s(least + 1), number)
        for number, (pace, (least, most)) in enumerate(zip(paces, ranges, strict=True))
        if least < most
    ]
    heapq.heapify(queue)
    while left > 0 and queue:
        _, number = heapq.heappop(queue)
        counts[number] += 1
        left -= 1
        if counts[number] < ranges[number][1]:
            heapq.heappush(queue, (paces[number].time_s(counts[number] + 1), number))
    if left:
        raise InternalError(f"no counts within {list(ranges)} make {total} micro-batches")
    return tuple(counts)


def ranges_of(plan: TrainPlan) -> list[tuple[int, int]]:
    """Return the fewest and most micro-batches that each pipeline may do.

    At least one, and no stage keeps more of them in memory at once than with the plan's counts:
    what fits was found out for those. So a pipeline under gpipe, which keeps all, can only do less.
    """
    most = plan.micro_batches - len(plan.pipelines) + 1
    known: dict[tuple[object, ...], tuple[int, int]] = {}
    ranges = []
    for pipeline in plan.pipelines:
        depth, chunks = len(pipeline.stages), len(pipeline.stages[0].chunks)
        key = (depth, chunks, pipeline.extra_warmup, pipeline.micro_batches)
        if key not in known:
            known[key] = _range(plan, pipeline, most)
        ranges.append(known[key])
    return ranges


def _range(plan: TrainPlan, pipeline: Pipeline, most: int) -> tuple[int, int]:
    planned, chunks = pipeline.micro_batches, len(pipeline.stages[0].chunks)
    if chunks > 1 and len(set(pipeline.extra_warmup)) > 1:
        return planned, planned  # with other counts such a row may never end
    kept = _kept(plan, pipeline, planned)

    def fits(count: int) -> bool:
        now = _kept(plan, pipeline, count)
        return all(a <= b for a, b in zip(now, kept, strict=True))

    low = high = planned
    while low > 1 and fits(low - 1):
        low -= 1
    while high < most and fits(high + 1):
        high += 1
    return low, high


def _kept(plan: TrainPlan, pipeline: Pipeline, count: int) -> list[float]:
    size, chunks = len(pipeline.stages), len(pipeline.stages[0].chunks)
    return [
        in_flight(plan.schedule, stage, size, count, chunks, pipeline.extra_warmup)
        for stage in range(size)
    ]


# -- when to change ----------------------------------------------------------------------------


class Rebalancer:
    """Counts of a job's steps: the plan's, or those that were recorded, or better ones.

    Nothing is decided from fewer than `every_steps` steps with the same counts, and nothing for a
    gain below `least_gain`. Counts that were tried count with what was measured, not with what is
    predicted of them, so that counts do not go to and fro.
    """

    def __init__(
        self,
        plan: TrainPlan,
        *,
        every_steps: int,
        least_gain: float,
        first_step: int = 0,
        recorded: Sequence[Since] = (),
        num_done: int = 0,
        warm_steps: int = WARM_STEPS,
    ) -> None:
        """`recorded`: what earlier runs of these steps decided, ascending; it is done again.
        `num_done`: steps that they did, from the job's first; up to there nothing else is decided.
        """
        self.every_steps, self.least_gain = every_steps, least_gain
        self._ranges = ranges_of(plan)
        self._total = plan.micro_batches
        self._to_come = deque(since for since in recorded if since[0] > first_step)
        past = [counts for step, counts in recorded if step <= first_step]
        self.counts: Counts = past[-1] if past else counts_of(plan)  # of the next step
        self._num_done, self._to_skip = num_done, warm_steps
        self._loads: deque[tuple[Load, ...]] = deque(maxlen=every_steps)
        self._steps_s: deque[float] = deque(maxlen=every_steps)
        self._seen: dict[Counts, tuple[int, float]] = {}  # decision, seconds of the last pipeline
        self._num_decisions = 0
        self._each_s: tuple[float, ...] = ()  # at the last decision

    def observe(self, step: int, loads: Sequence[Load], step_s: float) -> Change | None:
        """Take what a step that was done measured; then `counts` are those of the next one.

        Returns a decision that was made now, not one that was recorded. `step_s`: of a whole step,
        such as the one before. Every rank gives the same numbers.
        """
        if self._to_come:  # the steps up to there were done once already
            if self._to_come[0][0] == step + 1:
                self._take(self._to_come.popleft()[1])
            return None
        if self._to_skip > 0:
            self._to_skip -= 1
            return None
        self._loads.append(tuple(loads))
        self._steps_s.append(step_s)
        if len(self._loads) < self.every_steps or step + 1 < self._num_done:
            return None
        change = self._decide(step + 1)
        self._loads.clear()
        self._steps_s.clear()
        if change is not None:
            self._take(change.after)
        return change

    def _take(self, counts: Counts) -> None:
        self.counts, self._to_skip = counts, _SETTLING_STEPS

    def _decide(self, next_step: int) -> Change | None:
        total_s, busy_s = (list(column) for column in zip(*self._medians(), strict=True))
        step_s = statistics.median(self._steps_s)
        paces = [
            Pace(max(0.0, total - busy), max(busy, 1e-9) / count)
            for total, busy, count in zip(total_s, busy_s, self.counts, strict=True)
        ]
        each_s = tuple(pace.each_s for pace in paces)
        self._remember(max(total_s), each_s)
        best, soonest_s = self._best(paces)
        gain_s = max(total_s) - soonest_s
        if best == self.counts or gain_s < self.least_gain * max(step_s, *total_s):
            return None
        return Change(
            step=next_step, before=self.counts, after=best, each_s=each_s, step_s=step_s,
            predicted_s=step_s - gain_s,
        )  # fmt: skip

    def _medians(self) -> Iterator[tuple[float, float]]:
        for number in range(len(self.counts)):
            loads = [step[number] for step in self._loads]
            yield (
                statistics.median(load.total_s for load in loads),
                statistics.median(load.busy_s for load in loads),
            )

    def _remember(self, seconds: float, each_s: tuple[float, ...]) -> None:
        """Keep what the counts of now took, and forget what was measured at other speeds."""
        paired = zip(each_s, self._each_s or each_s, strict=True)
        if any(abs(now - before) > _DRIFT * before for now, before in paired):
            self._seen.clear()
        self._each_s = each_s
        self._num_decisions += 1
        self._seen = {
            counts: (when, took)
            for counts, (when, took) in self._seen.items()
            if self._num_decisions - when <= _REMEMBERED
        }
        self._seen[self.counts] = self._num_decisions, seconds

    def _best(self, paces: Sequence[Pace]) -> tuple[Counts, float]:
        """Return the counts that end first, and when: by the paces, or as it was measured."""
        wanted = share_out(paces, self._total, self._ranges)
        options = {wanted: finish_s(paces, wanted)}
        options |= {counts: seconds for counts, (_, seconds) in self._seen.items()}
        best = min(options, key=lambda counts: options[counts])
        return best, options[best]
