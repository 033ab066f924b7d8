"""Orders made from times: for uneven stages, slow links and memory that ends early.

The fixed orders (`schedules`) suit equal stages. Here each stage takes, whenever it is free, what
is ready and most urgent, in a simulated step; the rows that come out are orders like any other.
Greedy, so not optimal: `best_order` simulates several and keeps the shortest. Start there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.errors import CapacityError, ConfigError, UnsupportedError
from mxn.train.plan.actions import Action, Order
from mxn.train.plan.events import Timeline, simulate
from mxn.train.plan.schedules import order
from mxn.train.plan.times import PipelineTimes


def extra_for_links(times: PipelineTimes) -> tuple[int, ...]:
    """Return the extra warm-up of each stage that covers the messages between it and the loss.

    As many more micro-batches as the slowest stage does while messages are under way, there and
    back. Source: HAPT (2509.24859).
    """
    if times.num_chunks > 1:
        raise UnsupportedError(f"for one chunk per stage only, got {times.num_chunks}")
    period = max(f[0] + b[0] for f, b in zip(times.forward_s, times.backward_s, strict=True))
    under_way = 0.0
    extra = [0]
    hops = zip(times.forward_hops, times.backward_hops, strict=True)
    for there, back in reversed(list(hops)):
        under_way += there.link_s + there.send_s + back.link_s + back.send_s
        extra.append(math.ceil(under_way / period - 1e-9))
    return tuple(reversed(extra))


def best_order(
    times: PipelineTimes,
    num_micro_batches: int,
    stored_limits: Sequence[float],
    *,
    splits_weights: bool = False,
) -> Timeline:
    """Return the shortest simulated step among the orders that keep within the memory.

    `stored_limits` is how many micro-batches each stage can store (one chunk per stage). With
    `splits_weights`, orders with split backwards are tried too. `Timeline.order` is the order.

    Raises: CapacityError when no order keeps within a limit below 1; UnsupportedError for chunks.
    """
    _check(times, num_micro_batches, stored_limits)
    num = times.num_stages
    extra = extra_for_links(times)
    candidates: list[Order] = [
        order("1f1b", num, 1, num_micro_batches, extra_warmup=warmup)
        for warmup in dict.fromkeys([(0,) * num, *_parts_of(extra)])
    ]
    candidates.append(automatic_order(times, num_micro_batches, stored_limits))
    if splits_weights:
        candidates += [
            order("zero-bubble", num, 1, num_micro_batches, extra_warmup=warmup)
            for warmup in dict.fromkeys([(0,) * num, extra])
        ]
        candidates.append(
            automatic_order(times, num_micro_batches, stored_limits, splits_weights=True)
        )
    lines = [simulate(rows, times) for rows in candidates]
    fitting = [line for line in lines if _fits(line, stored_limits)]
    # The automatic orders keep within the limits, so there is always one.
    return min(fitting, key=lambda line: line.makespan_s)


def _parts_of(extra: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the extra warm-up cut down to each smaller height: less memory, often enough."""
    return [tuple(min(count, top) for count in extra) for top in range(1, min(max(extra), 8) + 1)]


def _fits(line: Timeline, limits: Sequence[float]) -> bool:
    return all(peak <= limit for peak, limit in zip(line.stored_peak, limits, strict=True))


def _check(times: PipelineTimes, num_micro_batches: int, limits: Sequence[float]) -> None:
    if times.num_chunks > 1:
        raise UnsupportedError(f"for one chunk per stage only, got {times.num_chunks}")
    if num_micro_batches < 1:
        raise ConfigError(f"num_micro_batches must be at least 1, got {num_micro_batches}")
    if len(limits) != times.num_stages:
        raise ConfigError(f"{len(limits)} stored_limits for {times.num_stages} stages")
    for stage, limit in enumerate(limits):
        if limit < 1:
            raise CapacityError(f"stage {stage} can store {limit} micro-batches, it needs 1")


def automatic_order(
    times: PipelineTimes,
    num_micro_batches: int,
    stored_limits: Sequence[float],
    *,
    splits_weights: bool = False,
) -> Order:
    """Return the order in which free stages take what is ready: backward, forward, weights.

    A stage that stores `stored_limits` micro-batches does no forward until a backward is done (its
    weight half with `splits_weights`). Weight halves fill the time in which nothing else is ready.

    Raises: as `best_order`.
    Source: the rule of the automatic schedule in Qi et al. 2023 (2401.10241), without its search.
    """
    _check(times, num_micro_batches, stored_limits)
    greedy = _Greedy(times, num_micro_batches, stored_limits, splits_weights)
    return greedy.run()


@dataclass(slots=True)
class _StageState:
    """What one stage has done, and when the next inputs arrive. Times are seconds."""

    forward_arrivals: list[float]
    backward_arrivals: list[float]
    row: list[Action]
    free_s: float = 0.0
    forwards: int = 0
    backwards: int = 0
    weights: int = 0


class _Greedy:
    """Stages in the order of time. A message's arrival is known when its pass begins."""

    def __init__(
        self, times: PipelineTimes, num_micro_batches: int, limits: Sequence[float], splits: bool
    ) -> None:
        num = times.num_stages
        self._times, self._batches = times, num_micro_batches
        self._limits, self._splits = limits, splits
        self._stages = [_StageState([], [], []) for _ in range(num)]
        self._stages[0].forward_arrivals = [0.0] * num_micro_batches
        self._link_free: dict[tuple[int, int], float] = {}
        self._heap = [(0.0, stage) for stage in range(num)]

    def run(self) -> Order:
        while self._heap:
            now, stage = heapq.heappop(self._heap)
            state = self._stages[stage]
            if now >= state.free_s:  # else it was woken while busy, and wakes again when it is free
                self._decide(stage, state, now)
        return tuple(tuple(state.row) for state in self._stages)

    def _decide(self, stage: int, state: _StageState, now: float) -> None:
        backward = self._ready(state.backward_arrivals, state.backwards, state.forwards)
        forward = math.inf
        if self._stored(state) < self._limits[stage]:
            forward = self._ready(state.forward_arrivals, state.forwards, self._batches)
        if backward <= now:
            self._backward(stage, state, now)
        elif forward <= now:
            self._forward(stage, state, now)
        elif state.weights < state.backwards and self._splits:
            self._act(state, Action("W", 0, state.weights), now, self._times.weight_s[stage][0])
            state.weights += 1
        else:
            soon = min(backward, forward)
            if soon < math.inf:
                heapq.heappush(self._heap, (soon, stage))
            return
        heapq.heappush(self._heap, (state.free_s, stage))

    def _ready(self, arrivals: list[float], number: int, limit: int) -> float:
        return arrivals[number] if number < min(len(arrivals), limit) else math.inf

    def _stored(self, state: _StageState) -> int:
        return state.forwards - (state.weights if self._splits else state.backwards)

    def _act(self, state: _StageState, action: Action, now: float, seconds: float) -> None:
        state.row.append(action)
        state.free_s = now + seconds

    def _forward(self, stage: int, state: _StageState, now: float) -> None:
        self._act(state, Action("F", 0, state.forwards), now, self._times.forward_s[stage][0])
        state.forwards += 1
        if stage == len(self._stages) - 1:
            state.backward_arrivals.append(state.free_s)
        else:
            self._send(stage, stage + 1, state)

    def _backward(self, stage: int, state: _StageState, now: float) -> None:
        seconds = self._times.backward_s[stage][0]
        if self._splits:
            seconds = max(seconds - self._times.weight_s[stage][0], 0.0)
        self._act(state, Action("B", 0, state.backwards), now, seconds)
        state.backwards += 1
        if stage > 0:
            self._send(stage, stage - 1, state)

    def _send(self, stage: int, to_stage: int, state: _StageState) -> None:
        """Note when the message arrives that a pass makes, and wake who waits for it."""
        times, goes_on = self._times, to_stage > stage
        hop = times.forward_hops[stage] if goes_on else times.backward_hops[to_stage]
        state.free_s += hop.send_s
        arrival = max(state.free_s, self._link_free.get((stage, to_stage), 0.0)) + hop.link_s
        if hop.link_s:
            self._link_free[stage, to_stage] = arrival
        there = self._stages[to_stage]
        (there.forward_arrivals if goes_on else there.backward_arrivals).append(arrival)
        heapq.heappush(self._heap, (max(arrival, there.free_s), to_stage))
