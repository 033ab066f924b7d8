"""When each pass and each message of one pipeline begins and ends. Start at `simulate`.

An event simulator: rows of actions (`schedules`) with seconds for passes and hops. A stage does
one action at a time, in its row's order; a link carries one message at a time in each direction,
in the order in which they were made. Knows no chips, bytes or plans (`simulate` makes the seconds),
and no two pipelines that share a wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mxn.errors import ConfigError, InternalError
from mxn.train.plan.actions import Action, Order, split_backwards, stored_peak
from mxn.train.plan.order_check import validate
from mxn.train.plan.times import Hop, PipelineTimes


class Transfer(NamedTuple):
    """A message on its way: what the pass `action` of `from_stage` made, until it has arrived."""

    from_stage: int
    to_stage: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One simulated pipeline. Rows are by stage and run beside the rows of `order`."""

    order: Order
    starts_s: tuple[Sequence[float], ...]
    ends_s: tuple[Sequence[float], ...]
    transfers: Sequence[Transfer]
    blocked_s: tuple[float, ...]  # stood still in sends and receives

    @property
    def num_stages(self) -> int:
        return len(self.order)

    @cached_property
    def makespan_s(self) -> float:
        return max(row[-1] for row in self.ends_s)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each stage computes."""
        return tuple(
            sum(ends) - sum(starts) for starts, ends in zip(self.starts_s, self.ends_s, strict=True)
        )

    @cached_property
    def sending_s(self) -> tuple[float, ...]:
        """Seconds of each stage's outgoing messages, also of those that hold up nothing."""
        seconds = [0.0] * self.num_stages
        for transfer in self.transfers:
            seconds[transfer.from_stage] += transfer.end_s - transfer.start_s
        return tuple(seconds)

    @cached_property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds that each stage neither computes nor is held up by a transfer of its own."""
        return tuple(
            self.makespan_s - busy - blocked
            for busy, blocked in zip(self.busy_s, self.blocked_s, strict=True)
        )

    @property
    def bubble(self) -> float:
        """Share of all stages' time that no pass fills, 0 to 1; blocking transfers are in it."""
        whole = self.num_stages * self.makespan_s
        return 1 - sum(self.busy_s) / whole if whole else 0.0

    @cached_property
    def stored_peak(self) -> tuple[float, ...]:
        """Most passes whose activations each stage stores at once."""
        return tuple(stored_peak(row) for row in self.order)

    def last_backward_s(self, stage: int, chunk: int) -> float:
        """Return when the gradients of a chunk are complete."""
        pairs = zip(self.order[stage], self.ends_s[stage], strict=True)
        return max(end for action, end in pairs if action.kind != "F" and action.chunk == chunk)


def simulate(order: Order, times: PipelineTimes, *, late_sends: bool = False) -> Timeline:
    """Return when everything of one step of a pipeline happens, by its rows and seconds.

    With `late_sends`, an activation leaves only after the gradient for the backward that follows
    has come: the order of engines that receive before they send.

    Raises: ConfigError for an order that does not fit `times`, is incomplete or never ends.
    """
    if len(order) != times.num_stages:
        raise ConfigError(f"an order of {len(order)} stages, times of {times.num_stages}")
    run = _Run(order, times, late_sends)
    run.all()
    if any(at < len(row) for at, row in zip(run.at, order, strict=True)):
        validate(order, num_chunks=times.num_chunks)
        if late_sends:
            raise ConfigError("this order never ends when activations are sent late")
        raise InternalError("the simulator stopped in an order that has no deadlock")
    return Timeline(
        order=order,
        starts_s=tuple(run.starts),
        ends_s=tuple(run.ends),
        transfers=run.transfers,
        blocked_s=tuple(run.blocked),
    )


class _Run:
    """State of a simulation. Each stage runs until it needs what is not there yet.

    Times follow from the rows alone, whichever stage is taken first: the order on each stage and on
    each link is fixed. So each action is looked at once, or twice if it had to wait.
    """

    def __init__(self, order: Order, times: PipelineTimes, late_sends: bool) -> None:
        num = len(order)
        self.order, self.times, self.late_sends = order, times, late_sends
        self.at = [0] * num
        self.clock = [0.0] * num
        self.starts: list[list[float]] = [[] for _ in order]
        self.ends: list[list[float]] = [[] for _ in order]
        self.blocked = [0.0] * num
        self.transfers: list[Transfer] = []
        self.link_free: dict[tuple[int, int], float] = {}
        self.arrived: dict[tuple[str, int, int], float] = {}
        self.waiting: dict[tuple[str, int, int], int] = {}
        self.todo = list(range(num))
        self.places: dict[int, dict[Action, int]] = {}
        self.held: list[tuple[int, Action, Hop] | None] = [None] * num
        self.seconds = [_seconds(order[stage], stage, times) for stage in range(num)]

    def all(self) -> None:
        while self.todo:
            self._stage(self.todo.pop())

    def _stage(self, stage: int) -> None:
        """Run one stage as far as what has arrived allows."""
        row, seconds = self.order[stage], self.seconds[stage]
        starts, ends = self.starts[stage], self.ends[stage]
        num_stages, times, arrived = len(self.order), self.times, self.arrived
        forward_hops, backward_hops = times.forward_hops, times.backward_hops
        last = num_stages * times.num_chunks - 1
        clock, at = self.clock[stage], self.at[stage]
        while at < len(row):
            action = row[at]
            kind, chunk, micro_batch = action
            part = chunk * num_stages + stage
            if (kind == "F" and part > 0) or (kind == "B" and part < last):
                need = (kind, part, micro_batch)
                arrival = arrived.pop(need, None)
                if arrival is None:
                    self.waiting[need] = stage
                    break
                hop = forward_hops[part - 1] if kind == "F" else backward_hops[part]
                if hop.receive_s:
                    self.blocked[stage] += hop.receive_s
                    clock += hop.receive_s
                clock = max(clock, arrival)
                if self.held[stage] is not None:
                    clock = self._send_held(stage, clock)
            starts.append(clock)
            clock += seconds[at]
            ends.append(clock)
            at += 1
            if kind == "F" and part < last:
                if self.late_sends and self._gradient_goes_first(stage, at):
                    self.held[stage] = (part + 1, action, forward_hops[part])
                    continue
                clock = self._send(stage, part + 1, action, forward_hops[part], clock)
            elif kind == "B" and part > 0:
                clock = self._send(stage, part - 1, action, backward_hops[part - 1], clock)
        self.clock[stage], self.at[stage] = clock, at

    def _gradient_goes_first(self, stage: int, at: int) -> bool:
        """Say if the backward at `at` needs a gradient that is made before the activation is used.

        At the ends of a step there is none: the next stage needs the activation first.
        """
        row, num_stages = self.order[stage], len(self.order)
        if at == len(row) or row[at].kind != "B":
            return False
        (_, made, batch), (_, chunk, due) = row[at - 1], row[at]
        to_stage = (stage + 1) % num_stages
        wraps = to_stage == 0
        if wraps and chunk == self.times.num_chunks - 1:
            return False
        places = self._places(to_stage)
        gradient, use = Action("B", chunk + wraps, due), Action("F", made + wraps, batch)
        return places[gradient] < places[use]

    def _places(self, stage: int) -> dict[Action, int]:
        if stage not in self.places:
            row = self.order[stage]
            self.places[stage] = {action: place for place, action in enumerate(row)}
        return self.places[stage]

    def _send_held(self, stage: int, clock: float) -> float:
        held = self.held[stage]
        assert held is not None
        self.held[stage] = None
        return self._send(stage, *held, clock)

    def _send(self, stage: int, part: int, action: Action, hop: Hop, clock: float) -> float:
        """Send what `action` made to `part`; return when the stage can go on."""
        to_stage = part % len(self.order)
        made, arrival = clock, clock + hop.send_s
        if hop.link_s:
            link = (stage, to_stage)
            made = max(arrival, self.link_free.get(link, 0.0)) - hop.send_s
            arrival = made + hop.send_s + hop.link_s
            self.link_free[link] = arrival
        if arrival > made:
            self.transfers.append(Transfer(stage, to_stage, action, made, arrival))
        need = (action.kind, part, action.micro_batch)
        self.arrived[need] = arrival
        if need in self.waiting:
            self.todo.append(self.waiting.pop(need))
        self.blocked[stage] += hop.send_s
        return clock + hop.send_s


def _seconds(row: Sequence[Action], stage: int, times: PipelineTimes) -> list[float]:
    """Return the seconds of each action of a row."""
    split = split_backwards(tuple(row))
    forward, backward = times.forward_s[stage], times.backward_s[stage]
    weight = times.weight_s[stage]
    whole = {"F": forward, "B": backward, "W": weight}
    inputs = [max(both - half, 0.0) for both, half in zip(backward, weight, strict=True)]
    try:
        return [
            inputs[chunk] if kind == "B" and (chunk, batch) in split else whole[kind][chunk]
            for kind, chunk, batch in row
        ]
    except IndexError:
        chunks = 1 + max(action.chunk for action in row)
        raise ConfigError(
            f"stage {stage} of the order has {chunks} chunks, the times have {times.num_chunks}"
        ) from None
