"""The clock work of a measurement: what a block counts, with a clock that tests turn by hand."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from mxn.train.run import layer_times
from mxn.train.run.layer_times import Chain, Effort, cost_of, middle_mean, spread, time_chain
from mxn.train.run.link_times import link_of


class Clock:
    """Time that passes only when a layer says so; with a quota of half a core if `waits`.

    After each 47 ms of work the process stands still for as long.
    """

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        self.waits = False

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        periods = int(self.worked / 0.047)
        self.worked += seconds
        self.now += seconds
        if self.waits:
            self.now += 0.047 * (int(self.worked / 0.047) - periods)


class Layers(nn.Module):
    """Two layers that take 10 ms forward, 6 ms for input and 9 ms for weight gradients each."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.clock = clock

    def forward(self, x, batch):
        self.clock.spend(0.020)
        x = torch.zeros(2) if x is None else _Spend.apply(x, self.clock, 0.012)
        return x * _Spend.apply(self.weight, self.clock, 0.018)


class _Spend(torch.autograd.Function):
    """A node of the graph whose backward takes time; it does not run when nobody asks for it."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.told = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        clock, seconds = ctx.told
        clock.spend(seconds)
        return gradient, None, None


class Optimizer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def step(self) -> None:
        self.clock.spend(0.004)


class Batch:
    __dataclass_fields__: ClassVar[dict] = {}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(layer_times, "time", clock)
    return clock


def timed(clock: Clock, first_input: torch.Tensor | None):
    chain = Chain(
        module=Layers(clock), first_input=first_input, batch=Batch(), num_layers=2,
        optimizer=Optimizer(clock),
    )  # fmt: skip
    return cost_of(time_chain(chain, Effort(), synchronize=lambda: None), 0.0)


def test_phases_are_told_apart_and_given_per_layer(clock):
    cost = timed(clock, torch.ones(2))
    assert cost.forward_s == pytest.approx(0.010)
    assert cost.backward_s == pytest.approx(0.015)
    assert cost.weight_s == pytest.approx(0.009)
    assert cost.optimizer_s == pytest.approx(0.002)


def test_the_embedding_has_no_weight_half(clock):
    cost = timed(clock, None)
    assert cost.weight_s == 0.0
    assert cost.backward_s == pytest.approx(0.009)  # tokens want no gradient


def test_a_quota_of_half_a_core_makes_every_layer_take_twice_as_long(clock):
    clock.waits = True
    chain = Chain(
        module=Layers(clock), first_input=torch.ones(2), batch=Batch(), num_layers=2,
        optimizer=None,
    )  # fmt: skip
    cost = cost_of(time_chain(chain, Effort(block_s=4.0), synchronize=lambda: None), 0.0)
    # The median of single passes would be 10 ms: most of them do not wait at all.
    assert cost.forward_s == pytest.approx(0.020, rel=0.1)
    assert cost.backward_s == pytest.approx(0.030, rel=0.1)


def test_a_slow_device_has_fewer_blocks_but_three(clock):
    chain = Chain(
        module=Layers(clock), first_input=torch.ones(2), batch=Batch(), num_layers=1,
        optimizer=None,
    )  # fmt: skip
    blocks = time_chain(chain, Effort(longest_s=0.01), synchronize=lambda: None)
    assert len(blocks) == 3
    assert cost_of(blocks, 0.0).optimizer_s == 0.0


def test_spread_is_half_the_middle_half():
    assert spread([1.0, 1.0, 1.0]) == 0.0
    assert spread([0.8, 0.9, 1.0, 1.1, 1.2]) == pytest.approx(0.1)


def test_a_cost_is_the_mean_without_the_extremes():
    """A job meets a machine's slow times as often as its quick ones; the median is one of both."""
    assert middle_mean([1.0, 3.0]) == 2.0
    assert middle_mean([1.0, 1.1, 9.0]) == 1.1  # one interruption is no speed
    levels = [1.0] * 12 + [1.5] * 8
    assert middle_mean([*levels, 0.1, 30.0]) == pytest.approx(sum(levels) / 20)


def test_a_link_never_gives_a_larger_message_less_time():
    link = link_of([(1e3, 2e-3), (1e6, 1e-3), (2e6, 2e-3), (4e6, 4e-3)], "measured")
    times = [link.transfer_s(size) for size in (1e2, 1e3, 1e6, 2e6, 3e6, 4e6, 8e6)]
    assert times == sorted(times)
    assert link.bytes_per_s == pytest.approx(1e9)
    assert link.transfer_s(8e6) == pytest.approx(8e-3)
    assert link.latency_s == 2e-3


def test_a_link_of_one_slow_point_has_its_rate():
    assert link_of([(1e3, 2.0)], "measured").bytes_per_s == 500.0
