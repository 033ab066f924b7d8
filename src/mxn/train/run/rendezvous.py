"""How the ranks of a job find each other: a TCPStore at an address, and who is who.

Knows addresses and names; knows no messages. Start at `serve_store` (launcher) and `meet` (ranks).
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from mxn.errors import PeerError
from mxn.train.run.link_limit import LinkLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank as the others see it."""

    rank: int
    device: str  # as a user types it: "cpu:0", "cuda:1"
    chip: str
    collective: str  # torch.distributed backend of its maker
    island: str  # ranks of one island talk through their collective
    limit: LinkLimit | None = None  # of its messages to other islands; for tests and emulation

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.device})"


def serve_store(host: str = "127.0.0.1") -> tuple[dist.TCPStore, str]:
    """Open the store at which ranks meet, on a free port. It lives as long as it is referenced.

    It asks nobody who he is, so it listens on the address of `host` and on no other; a TCPStore
    left to itself listens on every address of the machine.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=2048)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, f"{host}:{store.port}"


def open_store(address: str, *, timeout_s: float) -> dist.TCPStore:
    """Connect to a store. Raises: PeerError when nobody listens there in time."""
    host, _, port = address.rpartition(":")
    try:
        wait = timedelta(seconds=timeout_s)
        return dist.TCPStore(host, int(port), is_master=False, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            f"no store at {address!r} in {timeout_s:g} s: {str(error).splitlines()[0]}",
            rank=-1,
            hint="the launcher serves it; is it still running, and is the address right?",
        ) from error


def meet(store: dist.Store, me: Member, size: int, timeout_s: float) -> list[Member]:
    """Tell the others who this rank is, and return all of them by rank.

    Raises: PeerError naming the first rank that does not come in time.
    """
    store.set(f"member/{me.rank}", json.dumps(asdict(me)))
    members: list[Member] = []
    deadline_s = time.monotonic() + timeout_s
    for rank in range(size):
        left_s = max(0.001, deadline_s - time.monotonic())
        try:
            store.wait([f"member/{rank}"], timedelta(seconds=left_s))
        except RuntimeError as error:
            raise PeerError(
                f"rank {rank} of {size} did not come in {timeout_s:g} s",
                rank=rank,
                hint="its log says why; it may have failed to get its device",
            ) from error
        told = json.loads(store.get(f"member/{rank}"))
        limit = LinkLimit(**told["limit"]) if told["limit"] else None
        members.append(Member(**told | {"limit": limit}))
    return members
