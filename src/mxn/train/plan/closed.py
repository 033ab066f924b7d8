"""Closed forms for the time of one pipeline. Start at `pipeline_time`.

Exact for equal stages without links under 1F1B and GPipe; close elsewhere. The event simulator
(`simulate`) is the judge; this is for the planner, which asks thousands of times. Knows only
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.train.plan.costs import StageCost
from mxn.train.plan.plan import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTime:
    """Seconds of a step until the last backward, and when each stage ends within it."""

    total_s: float
    stage_ends_s: tuple[float, ...]


def pipeline_time(
    stages: Sequence[StageCost],
    hops: Sequence[tuple[float, float]],
    micro_batches: int,
    schedule: Schedule,
    *,
    chunks: int = 1,
    blocks: bool = False,
    late_sends: bool = False,
) -> PipelineTime:
    """Return the time of `micro_batches` through `stages`.

    `hops[s]` are the seconds of a micro-batch's activations from stage s to s + 1 and of its
    gradients back. With `blocks` both ends of a hop stand still meanwhile; without, only the data
    is late. `late_sends` (1F1B only) is the order of engines that receive the gradient that is due
    before they send the activation that is ready, so one micro-batch fewer is on its way.
    """
    if schedule == "gpipe":
        total = _gpipe(stages, hops, micro_batches, blocks)
    elif schedule == "zero-bubble":
        total = _bubble_form(stages, hops, micro_batches, blocks, chunks=1, waits_weight=True)
    elif schedule == "interleaved" and chunks > 1:
        total = _bubble_form(stages, hops, micro_batches, blocks, chunks=chunks, waits_weight=False)
    else:
        total = _one_f_one_b(stages, hops, micro_batches, blocks, late_sends)
    # The gradient of the last micro-batch leaves the later stages first.
    share = 0.0 if schedule == "zero-bubble" else 1.0 / chunks
    ends = [total]
    for stage, (_, back_s) in zip(stages, hops, strict=False):
        ends.append(ends[-1] - share * (stage.backward_s + back_s))
    return PipelineTime(total_s=total, stage_ends_s=tuple(ends))


def _held(stages: Sequence[StageCost], hops: Sequence[tuple[float, float]]) -> list[float]:
    """Return how long each stage is held by a micro-batch when its transfers block it."""
    return [
        stage.busy_s
        + (sum(hops[s - 1]) if s > 0 else 0.0)
        + (sum(hops[s]) if s < len(hops) else 0.0)
        for s, stage in enumerate(stages)
    ]


def _one_f_one_b(
    stages: Sequence[StageCost],
    hops: Sequence[tuple[float, float]],
    count: int,
    blocks: bool,
    late_sends: bool,
) -> float:
    """Return 1F1B: the slowest circle of dependencies, plus filling and draining around it.

    Stage s keeps S - s micro-batches, so a run of stages s … t goes round once per t - s + 1
    micro-batches: forward through all, backward through all, and both ways over the hops between.
    """
    size = len(stages)
    busy = [stage.busy_s for stage in stages]
    both = [sum(hop) for hop in hops]
    held = _held(stages, hops) if blocks else busy
    after = [0.0] * size  # from the end of stage t's forward to its backward
    for t in range(size - 2, -1, -1):
        after[t] = after[t + 1] + busy[t + 1] + both[t]
    worst = 0.0
    before = 0.0
    for s in range(size):
        through = 0.0
        for t in range(s, size):
            through += busy[t] + (both[t - 1] if t > s else 0.0)
            widest = max(held[s : t + 1])
            steady = _rounds(count - 1, t - s + 1, held[s] if t == s else through, widest)
            if late_sends and t > s:
                steady = max(steady, _rounds(count - 1, t - s, through - busy[s], widest))
            wait = _wait(stages[t], after[t], min(count, size - t) - 1, count > size - t)
            worst = max(worst, before + through + steady + wait)
        before += busy[s] + (both[s] if s < size - 1 else 0.0)
    return worst


def _wait(stage: StageCost, after_s: float, spare: int, is_long: bool) -> float:
    """Return how long a stage stands still for the rest of the pipeline, `after_s` there and back.

    It has `spare` forwards to do while the first micro-batch is away, and as many backwards while
    the last is. In a short step the first wait covers the second.
    """
    first = max(after_s - spare * stage.forward_s, 0.0)
    last = max(after_s - spare * stage.backward_s, 0.0)
    return min(first + last, after_s) if is_long else max(first, last)


def _rounds(count: int, each: int, round_s: float, slowest_s: float) -> float:
    """Return the time of `count` micro-batches when a round carries `each` of them."""
    return count // each * round_s + count % each * slowest_s


def _gpipe(
    stages: Sequence[StageCost], hops: Sequence[tuple[float, float]], count: int, blocks: bool
) -> float:
    total = 0.0
    for way, times in enumerate(
        ([stage.forward_s for stage in stages], [stage.backward_s for stage in stages])
    ):
        links = [hop[way] for hop in hops]
        held = [
            time + ((links[s - 1] if s else 0.0) + (links[s] if s < len(links) else 0.0)) * blocks
            for s, time in enumerate(times)
        ]
        total += sum(times) + sum(links) + (count - 1) * max(*held, *links, 0.0)
    return total


def _bubble_form(
    stages: Sequence[StageCost],
    hops: Sequence[tuple[float, float]],
    count: int,
    blocks: bool,
    *,
    chunks: int,
    waits_weight: bool,
) -> float:
    """Return interleaved (Narayanan 2021: bubble over v) or zero-bubble H1 (Qi 2023: F + B - W)."""
    held = _held(stages, [(a * chunks, b * chunks) for a, b in hops]) if blocks else None
    idle = [
        max(stage.busy_s - (2 * stage.weight_s if waits_weight else 0.0), 0.0) / chunks
        for stage in stages
    ]
    hop_s = sum(sum(hop) for hop in hops)
    return max(
        count * (stage.busy_s if held is None else held[s]) + sum(idle) - idle[s] + hop_s
        for s, stage in enumerate(stages)
    )
