"""The ranks of one stage as a team: what layers that are cut over them need of each other.

They are neighbouring devices of one group, so their maker's own collective carries it. Sums run in
the order in which the ranks compute, which is the same on all of them. Knows the bridge and
tensors; knows no layers. Start at `open_teams`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mxn.errors import UnsupportedError
from mxn.train.run.bridge import Bridge


class RankTeam:
    """One rank's view of its team; implements `net.shard.Team`."""

    def __init__(self, bridge: Bridge, ranks: Sequence[int], group: dist.ProcessGroup) -> None:
        self._bridge, self._ranks, self._group = bridge, tuple(ranks), group
        self.size, self.index = len(ranks), self._ranks.index(bridge.rank)

    def add(self, tensor: Tensor) -> None:
        """Sum a contiguous tensor in place; the same bits on all. Raises: PeerError."""
        self._wait(
            "a sum of tensor parallelism", lambda: dist.all_reduce(tensor, group=self._group)
        )

    def spread(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with that of the team's first rank. Raises: PeerError."""
        self._wait(
            "activations of its stage's first rank",
            lambda: dist.broadcast(tensor, src=self._ranks[0], group=self._group),
        )

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the parts of all, by index. Raises: PeerError."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in self._ranks]
        self._wait("parts of a layer", lambda: dist.all_gather(parts, part, group=self._group))
        return parts

    def _wait(self, what: str, run: Callable[[], Any]) -> None:
        begin_s = time.monotonic()
        try:
            run()
        except RuntimeError as error:
            raise self._bridge.lost(what, begin_s, error) from error


def open_teams(bridge: Bridge, teams: Sequence[Sequence[int]]) -> RankTeam | None:
    """Make the groups of all teams and return this rank's; None where it is alone on its stage.

    Every rank of the job calls it with the same teams. Raises: UnsupportedError for ranks that no
    collective backend holds together.
    """
    mine = None
    for ranks in teams:
        strangers = [rank for rank in ranks if not bridge.are_together(rank, ranks[0])]
        if strangers:
            first, other = bridge.members[ranks[0]], bridge.members[strangers[0]]
            raise UnsupportedError(
                f"tensor parallelism over {first.name} and {other.name}, which are of islands "
                f"{first.island!r} and {other.island!r}",
                hint="it needs devices of one maker; put them into stages of their own",
            )
        group = bridge.new_group(ranks)
        if group is not None:
            mine = RankTeam(bridge, ranks, group)
    return mine
