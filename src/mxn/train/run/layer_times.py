"""Times the layers of a model on one device, inside a process that is a rank in all but name.

A chain of neighbouring layers of one kind runs forward, backward and optimizer over and over, as in
training: gradients add up, and weights of one layer push those of another out of the cache. Time is
taken over blocks that hold many periods of a cgroup's quota: a single call under a quota is either
not held up at all or waits for the rest of a period, so the median of calls would be wrong. A cost
is the mean of blocks without the extreme ones: where the speed of a machine comes and goes, a job
meets all of it, and the median would be one of its levels. Knows no files, jobs or links. Start at
`time_chain`; `rounds.py` asks several times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mxn.train.plan.profile import LayerCost

_FEWEST_BLOCKS = 3
_STOPPED = 5.0  # times the median: no device is so much slower for a while
_MOST_REPEATS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure one kind at one micro-batch at a time."""

    blocks: int = 7
    block_s: float = 0.25  # at least; many periods of a quota
    warmup_s: float = 0.25
    longest_s: float = 20.0  # of one kind; a slow device then has fewer blocks, at least three


class Updates(Protocol):
    """What of an optimizer is timed."""

    def step(self) -> object: ...


@dataclass(slots=True)
class Chain:
    """Neighbouring layers of one kind, with a made-up micro-batch: what is measured.

    `first_input` is what the layers before would hand over; None: the chain starts with token ids.
    """

    module: nn.Module
    first_input: Tensor | None
    batch: Any
    num_layers: int
    optimizer: Updates | None  # None: nothing here is trained

    @property
    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def forward(self) -> tuple[Tensor | None, Tensor]:
        """Return the input that wants a gradient, if any, and the output."""
        given = None if self.first_input is None else self.first_input.detach().requires_grad_()
        return given, self.module(given, self.batch)


class Block(NamedTuple):
    """Mean seconds of a layer's passes in one block of time."""

    forward_s: float
    backward_s: float
    weight_s: float  # of `backward_s`
    optimizer_s: float
    each_s: float  # of a pass forward and backward with all that went on beside it

    @property
    def passes_s(self) -> float:
        return self.forward_s + self.backward_s


def time_chain(
    chain: Chain, effort: Effort, *, synchronize: Callable[[], object]
) -> tuple[Block, ...]:
    """Measure forward, both halves of backward and the optimizer of a layer of `chain`.

    `synchronize` waits for the device. A launch is cheap next to what it launches on a busy device,
    so an accelerator is only waited for at the ends of a run of passes.
    """
    runner = _Runner(chain, synchronize)
    runner.warm_up(effort.warmup_s)
    started, blocks = time.perf_counter(), []
    while len(blocks) < effort.blocks:
        if len(blocks) >= _FEWEST_BLOCKS and time.perf_counter() - started > effort.longest_s:
            break
        blocks.append(runner.block(effort.block_s))
    return tuple(blocks)


def longest_s(blocks: Sequence[Block]) -> float:
    """Return the `each_s` beyond which the process stood still in a block: a laptop slept, say."""
    return _STOPPED * statistics.median(block.each_s for block in blocks)


def cost_of(blocks: Sequence[Block], activation_bytes: float) -> LayerCost:
    """Return what a layer costs by its blocks."""
    means = [middle_mean(values) for values in zip(*blocks, strict=True)]
    forward_s, backward_s, weight_s, optimizer_s, _ = means
    return LayerCost(
        forward_s=forward_s, backward_s=backward_s, weight_s=min(weight_s, backward_s),
        optimizer_s=optimizer_s, activation_bytes=activation_bytes,
    )  # fmt: skip


def middle_mean(values: Sequence[float]) -> float:
    """Return the mean without a twentieth at each end; of three or more, without one at least."""
    cut = max(1, len(values) // 20) if len(values) > 2 else 0
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def spread(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


class _Runner:
    """Runs the phases of a chain and adds up their times."""

    def __init__(self, chain: Chain, synchronize: Callable[[], object]) -> None:
        self.chain = chain
        self.synchronize = synchronize
        output = chain.forward()[1]
        self.gradient = torch.ones_like(output) / max(1, output.numel())
        self.depth = 1 if output.device.type == "cpu" else 4  # passes between two waits
        self.repeats = 1  # of forward and backward between two updates

    def warm_up(self, seconds: float) -> None:
        """Also settle how many micro-batches follow an update: it empties the caches, and in a job
        comes once in many. A device so slow that few passes fill a block does fewer.
        """
        self._passes()
        spent_s, _ = self._timed(self._passes)
        self.repeats = max(1, min(_MOST_REPEATS, int(seconds / max(spent_s, 1e-9))))
        self.block(seconds)

    def block(self, seconds: float) -> Block:
        spent, rounds = [0.0] * 4, 0
        started = time.perf_counter()
        while not rounds or time.perf_counter() - started < seconds:
            for phase, value in enumerate(self._passes()):
                spent[phase] += value
            rounds += 1
        spent_s = time.perf_counter() - started
        layers = rounds * self.chain.num_layers
        forward, backward, inputs, update = (value / layers for value in spent)
        # An embedding's gradient is not put off (`deferred.py`), so it has no second half.
        weight = max(0.0, backward - inputs) if self.chain.first_input is not None else 0.0
        pairs = layers * self.depth * (self.repeats + (self.chain.first_input is not None))
        return Block(forward, backward, weight, update, spent_s / pairs)

    def _passes(self) -> tuple[float, float, float, float]:
        """Run passes forward and backward, one for inputs alone, an update; return their means."""
        forward_s = backward_s = inputs_s = 0.0
        for _ in range(self.repeats):
            spent_s, runs = self._timed(self._forwards)
            forward_s += spent_s
            backward_s += self._timed(partial(self._backwards, runs))[0]
        if self.chain.first_input is not None:
            _, runs = self._timed(self._forwards)
            inputs_s, _ = self._timed(partial(self._input_backwards, runs))
        update_s = self._update()
        each, of_all = 1.0 / self.depth, 1.0 / (self.depth * self.repeats)
        return forward_s * of_all, backward_s * of_all, inputs_s * each, update_s

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        started = time.perf_counter()
        result = run()
        self.synchronize()
        return time.perf_counter() - started, result

    def _forwards(self) -> list[tuple[Tensor | None, Tensor]]:
        return [self.chain.forward() for _ in range(self.depth)]

    def _backwards(self, runs: list[tuple[Tensor | None, Tensor]]) -> None:
        while runs:
            _, output = runs.pop()
            torch.autograd.backward(output, self.gradient)

    def _input_backwards(self, runs: list[tuple[Tensor | None, Tensor]]) -> None:
        while runs:
            given, output = runs.pop()
            assert given is not None
            torch.autograd.grad(output, given, self.gradient)

    def _update(self) -> float:
        """Once a step, so gradients are there; they are kept, as the next passes add to them."""
        if self.chain.optimizer is None:
            return 0.0
        return self._timed(self.chain.optimizer.step)[0]


def kept_bytes(chain: Chain) -> float:
    """Return the bytes that a forward pass keeps for its backward, weights and batch left out.

    Tensors that share a storage count once, and only as much of it as there is.
    """
    outside = {p.untyped_storage().data_ptr() for p in chain.module.parameters()}
    outside |= {
        value.untyped_storage().data_ptr()
        for value in (getattr(chain.batch, f.name) for f in fields(chain.batch))
        if isinstance(value, Tensor)
    }
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be another's

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chain.forward()
    return float(sum(kept.values()))
