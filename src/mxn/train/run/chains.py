"""Builds what is measured: a chain of neighbouring layers of one kind, with a made-up micro-batch.

Weights are random: their values change no time on the chips we know, their sizes do. Knows no
clocks and no files. Start at `make_chain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.models.names import Names
from mxn.models.spec import DecoderSpec
from mxn.train.run.data.batch import IGNORED, MicroBatch
from mxn.train.run.layer_times import Chain, Updates
from mxn.train.run.net import StageModule
from mxn.train.shapes import layer_kinds

_LONGEST_CHAIN = 4  # layers; enough that the weights of one do not stay in a cache

MakeOptimizer = Callable[[StageModule], Updates | None]
"""Given the layers, freezes what is not trained and returns what updates the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the layers of a job work on."""

    spec: DecoderSpec
    names: Names
    biases: frozenset[str]
    seq_tokens: int
    dtype: str  # of this device
    is_packed: bool


@dataclass(frozen=True, slots=True)
class SilentTeam:
    """A team of tensor parallelism of which one rank is here: what it computes, without the sums.

    The rank's times depend on no other then; what its sums take follows from the measured link.
    """

    size: int
    index: int = 0

    def add(self, tensor: Tensor) -> None:
        """Leave it: values change no time."""

    def gather(self, part: Tensor) -> list[Tensor]:
        return [part] * self.size


def chains_of(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Return the plan layers [first, end) to measure for each kind: its longest run, cut at four.

    >>> chains_of(llama_of_32_layers)
    {"embedding": (0, 1), "block": (1, 5), "head": (33, 34)}
    """
    kinds = layer_kinds(spec)
    found: dict[str, tuple[int, int]] = {}
    first = 0
    for at in range(1, len(kinds) + 1):
        if at < len(kinds) and kinds[at] == kinds[first]:
            continue
        kind, end = kinds[first], min(at, first + _LONGEST_CHAIN)
        if kind not in found or end - first > found[kind][1] - found[kind][0]:
            found[kind] = (first, end)
        first = at
    return found


def make_chain(
    work: Workload,
    layers: tuple[int, int],
    micro_batch: int,
    device: torch.device,
    make_optimizer: MakeOptimizer,
    *,
    tp: int = 1,
) -> Chain:
    """Return layers [first, end) on `device` with random weights and `micro_batch` random rows.

    `tp`: what one of so many ranks has of them. Raises: UnsupportedError when they cannot be cut.
    """
    first, end = layers
    dtype = getattr(torch, work.dtype)
    module = StageModule(
        work.spec,
        work.names,
        first,
        end,
        biases=work.biases,
        dtype=dtype,
        device=device,
        team=SilentTeam(tp) if tp > 1 else None,
    )
    generator = torch.Generator().manual_seed(first)
    _fill(module, generator)
    batch = made_up_batch(work, micro_batch, generator).to(device)
    given = None
    if first > 0:
        shape = (micro_batch, work.seq_tokens, work.spec.hidden)
        given = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
    return Chain(
        module=module,
        first_input=given,
        batch=batch,
        num_layers=end - first,
        optimizer=make_optimizer(module),
    )


def made_up_batch(work: Workload, micro_batch: int, generator: torch.Generator) -> MicroBatch:
    """Return rows of random tokens; packed ones hold two documents each."""
    shape = (micro_batch, work.seq_tokens)
    ids = torch.randint(work.spec.vocab_size, shape, generator=generator)
    whole = MicroBatch.of_rows(ids)
    cut = work.seq_tokens // 2
    if not work.is_packed or cut < 1:
        return whole
    labels, positions, segments = whole.labels, whole.positions, whole.segments
    labels[:, cut - 1] = IGNORED  # a document does not predict the next one
    positions[:, cut:] -= cut
    segments[:, cut:] = 1
    num_tokens = int((labels != IGNORED).sum())
    return MicroBatch(
        ids=ids, labels=labels, positions=positions, segments=segments, num_tokens=num_tokens
    )


@torch.no_grad()
def _fill(module: StageModule, generator: torch.Generator) -> None:
    """Norms become one, matrices small and random, choice biases zero."""
    for value in (*module.parameters(), *module.buffers()):
        if value.dim() == 1:
            value.copy_(torch.ones(value.shape) if value.is_floating_point() else value)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
