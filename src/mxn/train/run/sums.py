"""Sums over ranks of any makers: inside an island natively, across islands through its leaders.

A leader is the first rank of its island. Across, each of k leaders owns a k-th of the tensor: it
takes that part from the others, adds in the order of the leaders in float32, and gives the result
back. So the order of additions never depends on who came first, and every rank ends with the same
bits, also with bfloat16 on the wire. One thread per set of ranks does it while the caller computes.
Knows the bridge and tensors; knows nothing of gradients. Start at `SumGroup.start`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mxn.errors import InternalError
from mxn.train.run.background import Background, Done, Handle, Worker

if TYPE_CHECKING:
    from mxn.train.run.bridge import Bridge

_TAGS = 1 << 20  # tags below are those of the bridge's callers
_WHAT = "its part of a sum"


class SumGroup:
    """One set of ranks. All ranks of the job make it; only its own may start sums."""

    def __init__(self, bridge: Bridge, ranks: tuple[int, ...], *, number: int) -> None:
        self._bridge = bridge
        self._tag = _TAGS + 2 * number
        islands: dict[str, list[int]] = {}
        for rank in ranks:
            islands.setdefault(bridge.members[rank].island, []).append(rank)
        self._leaders = sorted(group[0] for group in islands.values())
        self._mine = islands.get(bridge.members[bridge.rank].island, [])
        self._is_member = bridge.rank in ranks
        self._native: dist.ProcessGroup | None = None
        for group in sorted(islands.values()):
            made = bridge.new_group(group)
            self._native = made or self._native
        self._worker: Worker | None = None
        self._is_exact = False

    def start(self, tensor: Tensor, *, is_exact: bool = False) -> Handle:
        """Begin to sum `tensor` in place; `is_exact`: in its own dtype also on the wire.

        Raises: InternalError for what no sum can be made of.
        """
        if not self._is_member:
            raise InternalError(f"rank {self._bridge.rank} is not in this sum")
        if not tensor.is_contiguous():
            raise InternalError("a sum needs a contiguous tensor")
        if not tensor.numel():
            return Done(tensor)
        if len(self._leaders) == 1:
            return self._inside(tensor)
        if self._worker is None:
            self._worker = Worker(f"mxn-sum-{self._tag - _TAGS}")
        stream = None
        if tensor.device.type != "cpu":
            stream = torch.accelerator.current_stream(tensor.device).record_event()
        return Background(self._worker.submit(lambda: self._across(tensor, stream, is_exact)))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close(timeout_s=1.0)

    def _inside(self, tensor: Tensor) -> Handle:
        if self._native is None:
            return Done(tensor)
        work = dist.all_reduce(tensor, group=self._native, async_op=True)
        return _Native(self._bridge, work, tensor)

    def _across(self, tensor: Tensor, ready: torch.Event | None, is_exact: bool) -> Tensor:
        """In the group's thread: reduce to the leader, sum over leaders, give it to the island."""
        bridge, begin_s = self._bridge, time.monotonic()
        if ready is not None:
            torch.accelerator.set_device_index(tensor.device.index)
            ready.synchronize()
        leader = self._mine[0]
        try:
            if self._native is not None:
                dist.reduce(tensor, dst=leader, group=self._native)
            if bridge.rank == leader:
                self._is_exact = is_exact  # sums of a group run one after another
                self._exchange(tensor.view(-1))
            if self._native is not None:
                dist.broadcast(tensor, src=leader, group=self._native)
        except RuntimeError as error:
            raise bridge.lost("a sum", begin_s, error) from error
        if ready is not None:
            torch.accelerator.synchronize(tensor.device)
        return tensor

    def _exchange(self, flat: Tensor) -> None:
        """Sum over the leaders; `flat` is 1-dim and is overwritten."""
        parts = _parts(flat, len(self._leaders))
        place = self._leaders.index(self._bridge.rank)
        others = [(at, peer) for at, peer in enumerate(self._leaders) if at != place]
        self._spread(parts, place, others, self._collect(parts, place, others))

    def _collect(self, parts: list[Tensor], place: int, others: list[tuple[int, int]]) -> Tensor:
        """Give every leader its part, and return the sum of the part that this one owns."""
        incoming = {at: self._recv(parts[place], peer, self._tag) for at, peer in others}
        sent = [self._send(parts[at], peer, self._tag) for at, peer in others]
        total: Tensor | None = None
        for at in range(len(self._leaders)):
            piece = incoming[at].wait() if at in incoming else parts[place]
            total = piece.clone() if total is None else total.add_(piece)
        for handle in sent:
            handle.wait()
        assert total is not None
        return total

    def _spread(
        self, parts: list[Tensor], place: int, others: list[tuple[int, int]], owned: Tensor
    ) -> None:
        """Give the owned sum to the other leaders and take theirs, into `parts`."""
        incoming = [(at, self._recv(parts[at], peer, self._tag + 1)) for at, peer in others]
        narrow = self._narrow(owned, others[0][1])
        # The others get it rounded, so this rank must keep the rounded one to stay in step.
        parts[place].copy_(owned if narrow is None else owned.to(narrow))
        sent = [self._send(owned, peer, self._tag + 1) for _, peer in others]
        for at, handle in incoming:
            parts[at].copy_(handle.wait())
        for handle in sent:
            handle.wait()

    def _send(self, part: Tensor, peer: int, tag: int) -> Handle:
        return self._bridge.wire.send(part, peer, tag, _WHAT, self._narrow(part, peer))

    def _recv(self, like: Tensor, peer: int, tag: int) -> Handle:
        shape, narrow = tuple(like.shape), self._narrow(like, peer)
        return self._bridge.wire.recv(shape, like.dtype, peer, tag, _WHAT, narrow, f"sum-{tag}")

    def _narrow(self, tensor: Tensor, peer: int) -> torch.dtype | None:
        return None if self._is_exact else self._bridge.wire_dtype(tensor.dtype, peer)


class _Native:
    """A sum that the maker's own collective does."""

    def __init__(self, bridge: Bridge, work: dist.Work | None, tensor: Tensor) -> None:
        self._bridge, self._work, self._tensor = bridge, work, tensor

    def wait(self) -> Tensor:
        if self._work is not None:
            begin_s = time.monotonic()
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self._bridge.lost("a sum inside its island", begin_s, error) from error
            self._work = None
        return self._tensor

    def is_done(self) -> bool:
        return self._work is None or self._work.is_completed()


def _parts(flat: Tensor, count: int) -> list[Tensor]:
    """Cut into `count` neighbouring views, the last one perhaps shorter or empty."""
    size = -(-flat.numel() // count)
    return [flat[at * size : (at + 1) * size] for at in range(count)]
