"""Traffic follows measured capacity: simulated replicas in fake time, the real fleet and meter."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mxn.engine.protocol import Delta
from mxn.serve.call_meter import Meter
from mxn.serve.fleet import Fleet, PoolRules, Replica, Seat
from mxn.serve.testing import Scripted

STEP_S = 0.02


@dataclass(eq=False)
class Stream:
    left: float
    meter: Meter
    owed: float = 0.0


class Simulated:
    """Replicas that share their speed between their streams; `fixed_s` is per step, whatever the
    number of streams, as on a chip that memory holds up."""

    def __init__(self, speeds: list[float], fixed_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.speeds = {f"r{at}": speed for at, speed in enumerate(speeds)}
        self.fixed_s = fixed_s
        self.fleet = Fleet(PoolRules(), clock=lambda: self.now_s)
        self.streams: dict[str, list[Stream]] = {}
        self.taken: dict[str, float] = {}
        self.random = random.Random(7)
        for name in self.speeds:
            self.fleet.add(Replica(id=name, client=Scripted(chip=name), max_in_flight=10_000))
            self.streams[name] = []
        self.forget()

    def forget(self) -> None:
        self.taken = dict.fromkeys(self.speeds, 0.0)

    def arrive(self) -> None:
        granted = self.fleet.pick([self.random.randrange(26) for _ in range(40)])
        assert granted is not None
        seat = granted[0]
        self.taken[seat.id] += 1
        meter = Meter(seat, 40, lambda: self.now_s)
        self.streams[seat.id].append(Stream(self.random.uniform(20, 60), meter))

    def advance(self) -> None:
        self.now_s += STEP_S
        for name, streams in self.streams.items():
            if not streams:
                continue
            gap_s = self.fixed_s + len(streams) / self.speeds[name]
            for stream in list(streams):
                self._grow(self.fleet.get(name), stream, STEP_S / gap_s)

    def _grow(self, seat: Seat | None, stream: Stream, tokens: float) -> None:
        assert seat is not None
        stream.owed += tokens
        stream.left -= tokens
        is_over = stream.left <= 0
        if stream.owed < 1 and not is_over:
            return
        ids = [0] * max(1, int(stream.owed))
        stream.owed -= len(ids)
        delta = Delta(request_id="", token_ids=ids, finish_reason="stop" if is_over else None)
        stream.meter.note(delta, waited_s=1e9)
        if is_over:
            self.streams[seat.id].remove(stream)
            self.fleet.release(seat)

    @property
    def num_running(self) -> int:
        return sum(len(streams) for streams in self.streams.values())

    def shares(self) -> list[float]:
        total = sum(self.taken.values())
        return [count / total for count in self.taken.values()]

    def run(self, seconds: float, load: Callable[[], None]) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            load()
            self.advance()

    def closed(self, num_clients: int) -> Callable[[], None]:
        def load() -> None:
            while self.num_running < num_clients:
                self.arrive()

        return load

    def open(self, per_s: float) -> Callable[[], None]:
        def load() -> None:
            if self.random.random() < per_s * STEP_S:
                self.arrive()

        return load


def check_shares(simulated: Simulated, want: list[float]) -> None:
    for got, expected in zip(simulated.shares(), want, strict=True):
        assert abs(got - expected) < 0.05, f"{simulated.shares()} instead of {want}"


SEVENTHS = [1 / 7, 2 / 7, 4 / 7]


@pytest.mark.parametrize("num_clients", [7, 28, 100])
def test_speeds_1_2_4_get_their_share_when_busy(num_clients: int) -> None:
    simulated = Simulated([100, 200, 400])
    simulated.run(20, simulated.closed(num_clients))
    simulated.forget()
    simulated.run(40, simulated.closed(num_clients))
    check_shares(simulated, SEVENTHS)


@pytest.mark.parametrize("per_s", [1.0, 5.0, 12.0])
def test_speeds_1_2_4_get_their_share_of_light_and_of_heavy_traffic(per_s: float) -> None:
    simulated = Simulated([100, 200, 400])
    simulated.run(60, simulated.open(per_s))
    simulated.forget()
    simulated.run(120, simulated.open(per_s))
    check_shares(simulated, SEVENTHS)


def test_equal_replicas_that_batch_well_stay_equal() -> None:
    simulated = Simulated([2000, 2000, 2000], fixed_s=0.02)
    simulated.run(60, simulated.closed(30))
    check_shares(simulated, [1 / 3] * 3)


def test_a_replica_that_slows_down_loses_its_weight_within_10_s() -> None:
    simulated = Simulated([200, 200, 200])
    simulated.run(30, simulated.closed(30))
    simulated.speeds["r1"] = 50.0
    simulated.run(10, simulated.closed(30))
    weights = {seat.id: seat.weight for seat in simulated.fleet}
    part = weights["r1"] / sum(weights.values())
    assert part < 0.16, f"{weights}: a ninth is what it can do now"
    simulated.forget()
    simulated.run(20, simulated.closed(30))
    check_shares(simulated, [4 / 9, 1 / 9, 4 / 9])
    simulated.speeds["r1"] = 200.0
    simulated.run(15, simulated.closed(30))
    simulated.forget()
    simulated.run(20, simulated.closed(30))
    check_shares(simulated, [1 / 3] * 3)
