"""The communicator of a training job whose ranks sit on chips of different makers.

Ranks of one collective backend (nccl, hccl, simccl, gloo, …) are an *island* and talk through it;
islands meet over host memory and gloo (which takes no device tensors), see `islands.py` and
`wire.py`. Sums go through `sums.py`. Rendezvous is a TCPStore. Knows ranks, devices and tensors;
knows nothing of layers, plans or micro-batches. Start at `Bridge.connect`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mxn.errors import PeerError, UserError
from mxn.train.run.background import Done, Handle
from mxn.train.run.islands import Channel, Islands
from mxn.train.run.link_limit import LinkLimit
from mxn.train.run.rendezvous import Member, meet, open_store, serve_store
from mxn.train.run.wire import PeerCount, Wire

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.train.run.sums import SumGroup

__all__ = [
    "Bridge",
    "BridgeOptions",
    "Channel",
    "Done",
    "Handle",
    "LinkLimit",
    "Member",
    "PeerCount",
    "open_store",
    "serve_store",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOptions:
    """How a job's ranks talk. The same on all ranks."""

    timeout_s: float = 600.0
    connect_timeout_s: float = 60.0
    wire_dtype: Literal["float32", "bfloat16"] = "float32"  # of float32 between islands
    limit: LinkLimit | None = None  # of this rank; the slower side of a link decides


class Bridge:
    """All ranks of a job. Make it with `connect`; `close` it at the end."""

    def __init__(
        self,
        rank: int,
        members: Sequence[Member],
        device: torch.device,
        store: dist.Store,
        options: BridgeOptions,
    ) -> None:
        self.rank, self.size = rank, len(members)
        self.members, self.device, self.store = tuple(members), device, store
        self.options = options
        world = dist.group.WORLD
        assert world is not None
        self.world: dist.ProcessGroup = world
        names = [member.name for member in members]
        self.wire = Wire(
            world,
            device,
            timeout_s=options.timeout_s,
            names=names,
            limit=self._limit_to,
            is_plain=self._is_plain_to,
        )
        self._islands = Islands(rank, members)
        self._sums: dict[tuple[int, ...], SumGroup] = {}

    @classmethod
    def connect(
        cls,
        store_address: str,
        rank: int,
        size: int,
        device: Device,
        *,
        island: str | None = None,
        options: BridgeOptions | None = None,
    ) -> Bridge:
        """Meet the other ranks at `store_address` ("127.0.0.1:1234"), where a TCPStore listens.

        `island` separates ranks that their collective backend would hold together, to emulate
        other makers; without it the backend is the island.
        Raises: PeerError when not all ranks come in time.
        """
        options = options or BridgeOptions()
        store = open_store(store_address, timeout_s=options.connect_timeout_s)
        me = Member(
            rank=rank,
            device=device.id,
            chip=device.chip,
            collective=device.collective,
            island=island or device.collective,
            limit=options.limit,
        )
        members = meet(store, me, size, options.connect_timeout_s)
        if store_address.startswith(("127.", "localhost")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "cpu:gloo",
            store=dist.PrefixStore("bridge", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=options.timeout_s),
        )
        return cls(rank, members, torch.device(device.torch_device), store, options)

    # -- point to point --------------------------------------------------------------------------

    def send(
        self, tensor: Tensor, to: int, tag: int, *, channel: str = "", what: str = "a message"
    ) -> Handle:
        """Send without waiting; do not write to `tensor` before the handle was waited for.

        Messages of one channel are received in the order they are sent; `tag` is below 2^20.
        """
        if (route := self._islands.route(self.rank, to, channel, tag)) is not None:
            group, peer, number = route
            tensor = tensor.detach().contiguous()
            work = group.send([tensor], peer, number)
            return self._native(work, tensor, to, what, is_sent=True)
        return self.wire.send(tensor, to, tag, what, self.wire_dtype(tensor.dtype, to))

    def recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        from_: int,
        tag: int,
        *,
        channel: str = "",
        what: str = "a message",
    ) -> Handle:
        """Post a receive into a new tensor on this rank's device; the handle gives it."""
        if (route := self._islands.route(from_, self.rank, channel, tag)) is not None:
            group, peer, number = route
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            work = group.recv([tensor], peer, number)
            return self._native(work, tensor, from_, what, is_sent=False)
        return self.wire.recv(shape, dtype, from_, tag, what, self.wire_dtype(dtype, from_))

    # -- all together ----------------------------------------------------------------------------

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every rank, by rank; each rank gives equally many."""
        mine = torch.tensor(values, dtype=torch.float64)
        out = torch.empty(self.size, len(values), dtype=torch.float64)
        begin_s = time.monotonic()
        try:
            dist.all_gather(list(out.unbind()), mine, group=self.world)
        except RuntimeError as error:
            raise self.lost("the numbers of a step", begin_s, error) from error
        return out.tolist()

    def barrier(self, what: str = "a barrier") -> None:
        """Wait for all ranks. Raises: PeerError."""
        begin_s = time.monotonic()
        try:
            dist.all_reduce(torch.zeros(1), group=self.world)
        except RuntimeError as error:
            raise self.lost(what, begin_s, error) from error

    def lost(self, what: str, begin_s: float, error: Exception) -> PeerError:
        """Return the error for something of many ranks that failed."""
        reason = str(error).splitlines()[0]
        return PeerError(
            f"{self.members[self.rank].name} waited {time.monotonic() - begin_s:.1f} s for {what} "
            f"of all ranks: {reason}",
            rank=-1,
            hint="one of the other ranks ended or hangs; their logs say which",
        )

    def open_sums(self, sets: Sequence[Sequence[int]]) -> None:
        """Make groups for `sum_`, the same sets in the same order on every rank."""
        from mxn.train.run.sums import SumGroup

        for ranks in sets:
            key = tuple(sorted(set(ranks)))
            if key not in self._sums:
                self._sums[key] = SumGroup(self, key, number=len(self._sums))

    def sum_(self, tensor: Tensor, ranks: Sequence[int], *, is_exact: bool = False) -> Handle:
        """Start to sum a contiguous tensor over `ranks` in place; bitwise equal on all of them.

        `is_exact`: in its own dtype on the wire, whatever the options say.

        Raises: UserError for a set that `open_sums` was not told of. Every rank of the set must
        call it for the same tensors in the same order.
        """
        key = tuple(sorted(set(ranks)))
        if key not in self._sums:
            raise UserError(f"no group for a sum over ranks {list(key)}; see `open_sums`")
        return self._sums[key].start(tensor, is_exact=is_exact)

    def open_channels(self, channels: Sequence[Channel]) -> None:
        """Name the channels of the job, the same on every rank; makes communicators as needed."""
        self._islands.open_channels(channels)

    @property
    def counts(self) -> dict[int, PeerCount]:
        """Bytes, messages and seconds by peer; sums inside an island are not among them."""
        return self.wire.counts

    @property
    def waited_s(self) -> float:
        """Seconds that `wait` of a receive stood still, over all peers."""
        return sum(count.waited_s for count in self.counts.values())

    def close(self) -> None:
        """Free threads and connections; the ranks need not do it together."""
        for group in self._sums.values():
            group.close()
        self.wire.close()
        dist.destroy_process_group()

    # -- islands ---------------------------------------------------------------------------------

    def are_together(self, rank: int, other: int) -> bool:
        """Return whether two ranks are of one island."""
        return self._islands.are_together(rank, other)

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Make a group of one island's ranks with its own backend. All ranks call it alike.

        Returns None where this rank is not of it, or it has one rank only.
        """
        return self._islands.new_group(ranks)

    def wire_dtype(self, dtype: torch.dtype, peer: int) -> torch.dtype | None:
        """Return the narrower dtype in which `dtype` goes to `peer`, None for its own."""
        if self.are_together(self.rank, peer) or dtype != torch.float32:
            return None
        return torch.bfloat16 if self.options.wire_dtype == "bfloat16" else None

    def _native(
        self, work: Any, tensor: Tensor, peer: int, what: str, *, is_sent: bool
    ) -> _NativeHandle:
        self.wire.note(peer, tensor.numel() * tensor.element_size(), is_sent=is_sent)
        what = f"it to take {what}" if is_sent else what
        return _NativeHandle(self.wire, work, tensor, peer, what, is_sent)

    def _is_plain_to(self, peer: int) -> bool:
        """Return whether messages of both sides lie in host memory as they are."""
        ours, theirs = self.members[self.rank], self.members[peer]
        is_host = ours.device.startswith("cpu") and theirs.device.startswith("cpu")
        return is_host and self._limit_to(peer) is None

    def _limit_to(self, peer: int) -> LinkLimit | None:
        limits = [self.members[rank].limit for rank in (self.rank, peer)]
        found = [limit for limit in limits if limit is not None]
        if self.are_together(self.rank, peer) or not found:
            return None
        return LinkLimit(
            bytes_per_s=min(limit.bytes_per_s for limit in found),
            latency_s=max(limit.latency_s for limit in found),
        )


@dataclass(slots=True)
class _NativeHandle:
    """A message that the maker's own collective carries. Waiting may only order the stream."""

    wire: Wire
    work: Any
    tensor: Tensor
    peer: int
    what: str
    is_sent: bool

    def wait(self) -> Tensor:
        if self.work is not None:
            begin_s = time.monotonic()
            self.wire.wait(self.work, self.peer, self.what)
            self.work = None
            if not self.is_sent:
                self.wire.count(self.peer).waited_s += time.monotonic() - begin_s
        return self.tensor

    def is_done(self) -> bool:
        return self.work is None or self.work.is_completed()
