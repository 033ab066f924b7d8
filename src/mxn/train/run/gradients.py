"""Gradients of a step, summed over all ranks that hold a layer, while others still compute.

Layers that the same ranks hold share buckets of float32 memory, in which their gradients lie from
the start, so nothing is copied together. A bucket is summed as soon as its last gradient is there
and those before it are under way: from the last layer down, the same order on all its ranks. The
matrix that embedding and head share is a sum of its own, over all ranks that hold either.
Under tensor parallelism a rank sums its part with those of the same part. Where the pipelines cut a
layer differently, the sum is of whole tensors: each rank puts in what it has, zeros elsewhere, and
takes its part out.
Knows placement, sums of gradients and the bridge; knows no micro-batches. Start at `Gradients`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mxn.train.plan.overlap import BUCKET_BYTES
from mxn.train.run.bridge import Bridge, Handle
from mxn.train.run.net import StageModule
from mxn.train.run.net.shard import Cut
from mxn.train.run.optim import GradientSums, Key
from mxn.train.run.placement import Placement, Team

Where = tuple[int, Key]
"""Chunk and key of a gradient."""


@dataclass(slots=True)
class _Bucket:
    layers: frozenset[int]
    memory: Tensor
    views: dict[Where, Tensor]  # of the memory: the gradients themselves, or places of whole ones
    is_whole: bool
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
        self._index = placement.places[bridge.rank].index
        self._size = len(placement.team_of(bridge.rank))
        layers = range(placement.plan.num_layers)
        self._firsts = [layer for layer in layers if bridge.rank in placement.teams_with(layer)[0]]
        by_layer = {layer: placement.sharers([layer]) for layer in layers}
        self._sharers = {layer: self._mine(sets) for layer, sets in by_layer.items()}
        self._cuts = [_cuts_of(module) for module in modules]
        self._is_tied = modules[0].spec.is_tied
        tied_sets = placement.sharers([layers[0], layers[-1]]) if self._is_tied else []
        self._tied_ranks = self._mine(tied_sets)
        # Teams of several sizes sum in one set, and all ranks of a team are in it.
        self._tied_are_together = {*placement.team_of(bridge.rank)} <= {*self._tied_ranks}
        self._tied = list(self._tied_keys()) if self._is_tied else []
        sets = sorted({ranks for sets in by_layer.values() for ranks in sets})
        bridge.open_sums([*sets, *tied_sets])
        teams = {frozenset(team) for team in placement.all_teams() if len(team) > 1}
        self._queues: dict[Team, list[_Bucket]] = {
            ranks: self._buckets(
                ranks, bucket_bytes, is_whole=any(team <= {*ranks} for team in teams)
            )
            for ranks in sets
            if len(ranks) > 1 and bridge.rank in ranks
        }
        self.started_s = 0.0  # in this step, until sums were under way: some backends wait there
        self._armed: set[int] = set()  # chunks whose last backward pass runs
        self._left: dict[int, int] = {}  # of an armed chunk's layers: parameters still to come
        for chunk, module_sums in enumerate(sums):
            for key in module_sums:
                parameter = module_sums.parameter(key)
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, chunk, key[0]))

    def clear(self) -> None:
        """Begin a step."""
        self.started_s = 0.0
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
                if bucket.is_whole:
                    for (chunk, key), view in bucket.views.items():
                        self._sums[chunk][key].copy_(self._part(bucket, (chunk, key), view))
        if tied is not None:
            tied()

    @torch.no_grad()
    def share_weights(self, owned: Callable[[int, Key], Tensor | None]) -> None:
        """Give the weights of owned layers to their other holders, and take theirs.

        `owned` gives the float32 weights of a chunk's parameter, None of one that another rank
        owns: each holder rounds them to what it computes in.
        Uses the memory of the gradients, which are lost: a sum with zeros everywhere else.
        """
        handles = []
        for ranks, queue in self._queues.items():
            for bucket in queue:
                bucket.memory.zero_()
                for where, view in bucket.views.items():
                    if (weights := owned(*where)) is not None:
                        self._put(bucket, where, view, weights)
                handles.append((bucket, self._bridge.sum_(bucket.memory, ranks, is_exact=True)))
        for bucket, handle in handles:
            handle.wait()
            for where, view in bucket.views.items():
                if owned(*where) is None:
                    self._parameter(*where).copy_(self._part(bucket, where, view))

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
            is_first = is_first and self._index == 0
            return is_first and self._tied_ranks[0] == self._bridge.rank
        # What is whole on every rank of a team counts on its first one.
        return key[0] in self._firsts and (self._index == 0 or key[1] in self._cuts[chunk])

    def _tied_keys(self) -> Iterator[tuple[int, Key]]:
        """Yield chunk and key of this rank's copies of the tied matrix."""
        for chunk, (module, sums) in enumerate(zip(self._modules, self._sums, strict=True)):
            copies = [module.embedding.weight] if module.has_embedding else []
            copies += [module.head.weight] if module.has_head else []
            for key in sums:
                if any(sums.parameter(key) is copy for copy in copies):
                    yield chunk, key

    def _mine(self, sets: Sequence[Team]) -> Team:
        """Return the set that this rank is in; empty where it is in none."""
        return next((ranks for ranks in sets if self._bridge.rank in ranks), ())

    def _buckets(self, ranks: Team, bucket_bytes: int, *, is_whole: bool) -> list[_Bucket]:
        """Lay the gradients of the layers that just these ranks hold into buckets, last first."""
        layers = [layer for layer, held in self._sharers.items() if held == ranks]
        groups: list[list[int]] = [[]]
        filled = 0
        for layer in sorted(layers, reverse=True):
            shapes = [self._shape(where, is_whole=is_whole) for where in self._of_layer(layer)]
            size = 4 * sum(map(math.prod, shapes))
            if groups[-1] and filled + size > bucket_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(layer)
            filled += size
        return [self._bucket(group, is_whole=is_whole) for group in groups]

    def _bucket(self, layers: list[int], *, is_whole: bool) -> _Bucket:
        places = [where for layer in layers for where in self._of_layer(layer)]
        shapes = [self._shape(where, is_whole=is_whole) for where in places]
        sizes = [math.prod(shape) for shape in shapes]
        memory = torch.zeros(sum(sizes), dtype=torch.float32, device=self._modules[0].device)
        views = {
            where: view.view(shape)
            for where, shape, view in zip(places, shapes, memory.split(sizes), strict=True)
        }
        if not is_whole:
            for (chunk, key), view in views.items():
                self._sums[chunk].place(key, view)
        return _Bucket(frozenset(layers), memory, views, is_whole)

    def _shape(self, where: Where, *, is_whole: bool) -> tuple[int, ...]:
        shape, cut = self._parameter(*where).shape, self._cut(where)
        return cut.whole_shape(shape, self._size) if cut is not None and is_whole else tuple(shape)

    def _cut(self, where: Where) -> Cut | None:
        return self._cuts[where[0]].get(where[1][1])

    def _put(self, bucket: _Bucket, where: Where, view: Tensor, values: Tensor) -> None:
        """Put this rank's values into zeroed memory, such that each counts once in the sum."""
        if not bucket.is_whole:
            view.copy_(values)
        elif (cut := self._cut(where)) is not None:
            cut.put(view, values, self._index, self._size)
        elif self._index == 0:
            view.copy_(values)

    def _part(self, bucket: _Bucket, where: Where, view: Tensor) -> Tensor:
        cut = self._cut(where) if bucket.is_whole else None
        return view if cut is None else cut.part(view, self._index, self._size)

    def _parameter(self, chunk: int, key: Key) -> Tensor:
        return self._sums[chunk].parameter(key)

    def _of_layer(self, layer: int) -> list[Where]:
        """Return chunk and key of what a layer trains but the tied matrix, by name."""
        return sorted(
            (chunk, key)
            for chunk, sums in enumerate(self._sums)
            for key in sums
            if key[0] == layer and (chunk, key) not in self._tied
        )

    def _arrived(self, chunk: int, layer: int, _: Tensor) -> None:
        """A parameter's gradient was added to; called by autograd."""
        if chunk not in self._armed:
            return
        self._left[layer] -= 1
        if self._left[layer] == 0:
            self._complete_layer(layer)

    def _complete_layer(self, layer: int) -> None:
        queue = self._queues.get(self._sharers[layer], [])
        for bucket in queue:
            bucket.waiting.discard(layer)
        for bucket in queue:
            if bucket.waiting:
                return
            if bucket.handle is None:
                if bucket.is_whole:
                    self._fill(bucket)
                ranks = self._sharers[next(iter(bucket.layers))]
                begin_s = time.perf_counter()
                bucket.handle = self._bridge.sum_(bucket.memory, ranks)
                self.started_s += time.perf_counter() - begin_s

    @torch.no_grad()
    def _fill(self, bucket: _Bucket) -> None:
        bucket.memory.zero_()
        for (chunk, key), view in bucket.views.items():
            self._put(bucket, (chunk, key), view, self._sums[chunk][key])

    def _sum_tied(self) -> Callable[[], None] | None:
        """Start the sum of the tied matrix; the result puts it into all copies of this rank."""
        if not self._tied or (len(self._tied_ranks) == 1 and len(self._tied) == 1):
            return None
        copies = [self._sums[chunk][key] for chunk, key in self._tied]
        for copy in copies[1:]:
            copies[0].add_(copy)
        if self._index > 0 and self._tied_are_together:
            copies[0].zero_()  # the first rank of the team has the same, and all are added
        handle = self._bridge.sum_(copies[0], self._tied_ranks)

        def spread() -> None:
            handle.wait()
            for copy in copies[1:]:
                copy.copy_(copies[0])

        return spread


def _cuts_of(module: StageModule) -> dict[str, Cut]:
    layers = range(module.first, module.end)
    return {name: cut for layer in layers for name, cut in module.layer_cuts(layer).items()}
