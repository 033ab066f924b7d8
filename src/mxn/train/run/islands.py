"""Ranks of one collective backend: their groups, their channels, and the way between two ranks.

Knows who is of which island and torch's process groups; moves no tensors. Start at `Islands`.

Traps this file is shaped by: nccl-like backends ignore tags and run sends and receives of a pair in
one order, so each *channel* there is a communicator of its own (`open_channels`); torch names a
group made by part of the ranks after how many groups those have, so all ranks make every group, in
one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from mxn.errors import UserError
from mxn.train.run.rendezvous import Member

TAGGED = frozenset({"gloo", "simccl"})
"""Backends whose point-to-point messages are matched by tag. The others are given channels."""

Channel = tuple[int, int, str]
"""Sender, receiver, and what runs there in one order, such as "forward 3"."""


class Islands:
    """The islands of a job as one of its ranks has them. All ranks make and use them alike."""

    def __init__(self, rank: int, members: Sequence[Member]) -> None:
        """Make the groups of this rank's island. Raises: UserError for an island of two backends"""
        self._rank, self._members = rank, tuple(members)
        self._group: dist.ProcessGroup | None = None
        self._ranks: list[int] = []
        self._channels: dict[Channel, dist.ProcessGroup] = {}
        self._open()

    def are_together(self, rank: int, other: int) -> bool:
        """Return whether two ranks are of one island."""
        return self._members[rank].island == self._members[other].island

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Make a group of one island's ranks with its own backend. All ranks call it alike.

        Returns None where this rank is not of it, or it has one rank only.
        """
        if len(ranks) < 2:
            return None
        backend = self._members[ranks[0]].collective
        group: Any = dist.new_group(list(ranks), backend=backend)
        return group if self._rank in ranks else None

    def open_channels(self, channels: Sequence[Channel]) -> None:
        """Make communicators for the channels that need one. All ranks call it alike."""
        for channel in channels:
            sender, receiver, _ = channel
            if not self.are_together(sender, receiver):
                continue
            backend = self._members[sender].collective
            if backend in TAGGED or channel in self._channels:
                continue
            group: Any = dist.new_group([sender, receiver], backend=backend)
            if self._rank in (sender, receiver):
                self._channels[channel] = group

    def route(
        self, sender: int, receiver: int, channel: str, tag: int
    ) -> tuple[dist.ProcessGroup, int, int] | None:
        """Return the maker's own group between two ranks, the peer's number in it, and the tag.

        None: the way leads through the bridge.
        """
        peer = receiver if sender == self._rank else sender
        own = self._channels.get((sender, receiver, channel))
        if own is not None:
            return own, int(peer > self._rank), 0  # torch sorts the ranks of a group
        if self._group is not None and self.are_together(sender, receiver):
            return self._group, self._ranks.index(peer), tag
        return None

    def _open(self) -> None:
        for island in sorted({member.island for member in self._members}):
            ranks = [m.rank for m in self._members if m.island == island]
            collectives = {self._members[rank].collective for rank in ranks}
            if len(collectives) > 1:
                raise UserError(
                    f"island {island!r} has ranks of different collectives: "
                    f"{', '.join(sorted(collectives))}"
                )
            backend = collectives.pop()
            if backend == "gloo" or backend not in TAGGED:
                continue  # the world's group serves; or channels are made by name
            group = self.new_group(ranks)
            if group is not None:
                self._group, self._ranks = group, ranks
