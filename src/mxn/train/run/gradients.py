"""Gradients of a step, summed over all ranks that hold a layer, while others still compute.

Layers that the same ranks hold share buckets of float32 memory, in which their gradients lie from
the start, so nothing is copied together. A bucket is summed as soon as its last gradient is there
and those before it are under way: from the last layer down, the same order on all its ranks. The
matrix that embedding and head share is a sum of its own, over all ranks that hold either.
Knows placement, sums of gradients and the bridge; knows no micro-batches. Start at `Gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mxn.train.run.bridge import Bridge, Handle
from mxn.train.run.net import StageModule
from mxn.train.run.optim import GradientSums, Key
from mxn.train.run.placement import Placement

BUCKET_BYTES = 8 << 20
"""Large enough that a link runs at its rate, small enough that summing starts early."""


@dataclass(slots=True)
class _Bucket:
    layers: frozenset[int]
    memory: Tensor
    handle: Handle | None = None
    waiting: set[int] = field(default_factory=set)  # layers whose gradients are not complete


class Gradients:
    """The gradients of one rank's chunks and their sums over the ranks of the job."""

    def __init__(
        self,
        placement: Placement,
        bridge: Bridge,
        modules: Sequence[StageModule],
        sums: Sequence[GradientSums],
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Every rank of the job makes one at the same time, as it opens groups for sums."""
        self._bridge, self._modules, self._sums = bridge, modules, sums
        self._holders = placement.holders()
        self._is_tied = modules[0].spec.is_tied
        last = placement.plan.num_layers - 1
        both = sorted({*self._holders[0], *self._holders[last]})
        self._tied_ranks = both if self._is_tied else []
        self._tied = list(self._tied_keys()) if self._is_tied else []
        sets = sorted({tuple(ranks) for ranks in self._holders.values()})
        bridge.open_sums([*sets, self._tied_ranks] if self._tied_ranks else sets)
        self._queues = {
            ranks: self._buckets(ranks, bucket_bytes)
            for ranks in sets
            if len(ranks) > 1 and bridge.rank in ranks
        }
        self._armed: set[int] = set()  # chunks whose last backward pass runs
        self._left: dict[int, int] = {}  # of an armed chunk's layers: parameters still to come
        for chunk, module_sums in enumerate(sums):
            for key in module_sums:
                parameter = module_sums.parameter(key)
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, chunk, key[0]))

    def clear(self) -> None:
        """Begin a step."""
        for sums in self._sums:
            sums.clear()
        for queue in self._queues.values():
            for bucket in queue:
                bucket.handle, bucket.waiting = None, set(bucket.layers)

    def arm(self, chunk: int) -> None:
        """The chunk's last backward pass begins: layers are complete as it passes them."""
        self._armed.add(chunk)
        for layer, _ in self._sums[chunk]:
            self._left[layer] = self._left.get(layer, 0) + 1

    def complete(self, chunk: int) -> None:
        """All gradients of a chunk are there."""
        self._armed.discard(chunk)
        module = self._modules[chunk]
        for layer in range(module.end - 1, module.first - 1, -1):
            self._left.pop(layer, None)
            self._complete_layer(layer)

    def finish(self) -> None:
        """Wait for all sums. Raises: PeerError when another rank does not take part."""
        tied = self._sum_tied()
        for queue in self._queues.values():
            for bucket in queue:
                assert bucket.handle is not None
                bucket.handle.wait()
        if tied is not None:
            tied()

    @torch.no_grad()
    def share_weights(self, is_owned: Callable[[Key], bool]) -> None:
        """Give the weights of owned layers to their other holders, and take theirs.

        Uses the memory of the gradients, which are lost: a sum with zeros everywhere else.
        """
        handles = []
        for ranks, queue in self._queues.items():
            for bucket in queue:
                bucket.memory.zero_()
                for chunk, key in self._in(bucket):
                    if is_owned(key):
                        self._sums[chunk][key].copy_(self._parameter(chunk, key))
                handles.append((bucket, self._bridge.sum_(bucket.memory, ranks, is_exact=True)))
        for bucket, handle in handles:
            handle.wait()
            for chunk, key in self._in(bucket):
                if not is_owned(key):
                    self._parameter(chunk, key).copy_(self._sums[chunk][key])

    @property
    def tied_keys(self) -> set[Key]:
        """Return the keys of this rank's copies of the tied matrix."""
        return {key for _, key in self._tied}

    def square_norm(self) -> float:
        """Return this rank's part of the squared global norm; each parameter counts on one rank."""
        total = 0.0
        for chunk, sums in enumerate(self._sums):
            total += sums.square_norm(partial(self._counts, chunk)).item()
        return total

    def _counts(self, chunk: int, key: Key) -> bool:
        if (chunk, key) in self._tied:
            is_first = (chunk, key) == self._tied[0]
            return is_first and self._tied_ranks[0] == self._bridge.rank
        return self._holders[key[0]][0] == self._bridge.rank

    def _tied_keys(self) -> Iterator[tuple[int, Key]]:
        """Yield chunk and key of this rank's copies of the tied matrix."""
        for chunk, (module, sums) in enumerate(zip(self._modules, self._sums, strict=True)):
            copies = [module.embedding.weight] if module.has_embedding else []
            copies += [module.head.weight] if module.has_head else []
            for key in sums:
                if any(sums.parameter(key) is copy for copy in copies):
                    yield chunk, key

    def _buckets(self, ranks: tuple[int, ...], bucket_bytes: int) -> list[_Bucket]:
        """Lay the gradients of the layers that just these ranks hold into buckets, last first."""
        layers = [layer for layer, held in self._holders.items() if tuple(held) == ranks]
        groups: list[list[int]] = [[]]
        filled = 0
        for layer in sorted(layers, reverse=True):
            size = 4 * sum(self._parameter(*where).numel() for where in self._of_layer(layer))
            if groups[-1] and filled + size > bucket_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(layer)
            filled += size
        return [self._bucket(group) for group in groups]

    def _bucket(self, layers: list[int]) -> _Bucket:
        places = [where for layer in layers for where in self._of_layer(layer)]
        total = sum(self._parameter(*where).numel() for where in places)
        memory = torch.zeros(total, dtype=torch.float32, device=self._modules[0].device)
        at = 0
        for chunk, key in places:
            like = self._parameter(chunk, key)
            view = memory[at : at + like.numel()].view(like.shape)
            self._sums[chunk].place(key, view)
            at += like.numel()
        return _Bucket(frozenset(layers), memory)

    def _parameter(self, chunk: int, key: Key) -> Tensor:
        return self._sums[chunk].parameter(key)

    def _of_layer(self, layer: int) -> list[tuple[int, Key]]:
        """Return chunk and key of what a layer trains but the tied matrix, by name."""
        return sorted(
            (chunk, key)
            for chunk, sums in enumerate(self._sums)
            for key in sums
            if key[0] == layer and (chunk, key) not in self._tied
        )

    def _in(self, bucket: _Bucket) -> Iterator[tuple[int, Key]]:
        return (where for layer in bucket.layers for where in self._of_layer(layer))

    def _arrived(self, chunk: int, layer: int, _: Tensor) -> None:
        """A parameter's gradient was added to; called by autograd."""
        if chunk not in self._armed:
            return
        self._left[layer] -= 1
        if self._left[layer] == 0:
            self._complete_layer(layer)

    def _complete_layer(self, layer: int) -> None:
        queue = self._queues.get(tuple(self._holders[layer]), [])
        for bucket in queue:
            bucket.waiting.discard(layer)
        for bucket in queue:
            if bucket.waiting:
                return
            if bucket.handle is None:
                ranks = self._holders[next(iter(bucket.layers))]
                bucket.handle = self._bridge.sum_(bucket.memory, ranks)

    def _sum_tied(self) -> Callable[[], None] | None:
        """Start the sum of the tied matrix; the result puts it into all copies of this rank."""
        if not self._tied or (len(self._tied_ranks) == 1 and len(self._tied) == 1):
            return None
        copies = [self._sums[chunk][key] for chunk, key in self._tied]
        for copy in copies[1:]:
            copies[0].add_(copy)
        handle = self._bridge.sum_(copies[0], self._tied_ranks)

        def spread() -> None:
            handle.wait()
            for copy in copies[1:]:
                copy.copy_(copies[0])

        return spread
