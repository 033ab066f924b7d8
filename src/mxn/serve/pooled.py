"""PooledClient: several replicas as one, whose streams go on when a replica dies.

A stream that loses its replica is sent to another with the token ids made so far; what the client
has already got is cut from the new one's text, so it sees no seam. Which replica takes a request is
decided in `fleet.py` and `routing`. Start at `PooledClient.generate`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Encode,
    Encoded,
    EngineStats,
    Generate,
    LoadAdapter,
    ModelInfo,
    UnloadAdapter,
)
from mxn.errors import MxnError, NotFoundError
from mxn.ledger.types import CountBasis
from mxn.serve.call import LOST, Core
from mxn.serve.call_encode import EncodeCall
from mxn.serve.call_stream import StreamCall
from mxn.serve.context import current
from mxn.serve.fleet import Clock, PoolRules, Replica, Seat
from mxn.serve.routing.admission import Chips

_BASES: tuple[CountBasis, ...] = ("events", "counted", "server", "engine")  # least exact first
_DRAIN_LOOK_S = 0.05


class PooledClient:
    """An `EngineClient` over replicas of one model. Views of it share everything but their chip."""

    def __init__(
        self,
        replicas: Iterable[Replica] = (),
        rules: PoolRules | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._core = Core(rules or PoolRules(), clock)
        self._chips: Chips = None
        for replica in replicas:
            self.add(replica)

    @property
    def info(self) -> ModelInfo:
        """What all replicas together can do; `max_context` is the smallest."""
        return self._core.fleet.info(self._chips)

    @property
    def is_healthy(self) -> bool:
        """Whether any replica is there."""
        seats = self._core.fleet.of(self._chips)
        return any(seat.replica.client.is_healthy for seat in seats)

    @property
    def count_basis(self) -> CountBasis:
        """Where the current request's counts come from: the least exact of what served it."""
        seats = [self._core.fleet.get(hop.replica) for hop in current().hops]
        found: set[CountBasis] = {_basis_of(seat) for seat in seats if seat is not None}
        return min(found, key=_BASES.index) if found else "engine"

    @property
    def replicas(self) -> list[Replica]:
        return [seat.replica for seat in self._core.fleet.of(self._chips)]

    def chips(self) -> list[str]:
        """Return the chips of the replicas, each once."""
        return list(dict.fromkeys(replica.chip for replica in self.replicas))

    def seats(self) -> list[Seat]:
        """Return the replicas with what is known of them, for status pages."""
        return self._core.fleet.of(self._chips)

    @property
    def now_s(self) -> float:
        """The time by which states of seats are asked."""
        return self._core.fleet.clock()

    @property
    def num_queued(self) -> int:
        """Requests that wait until a replica has room."""
        return len(self._core.gate.admission)

    def pinned(self, *chips: str) -> PooledClient:
        """Return a view of the replicas on some chips. Raises: NotFoundError."""
        for chip in chips:
            if chip not in self.chips():
                raise NotFoundError(f"no replica runs on {chip!r}; there are {self.chips()}")
        view = PooledClient.__new__(PooledClient)
        view._core, view._chips = self._core, frozenset(chips)
        return view

    def add(self, replica: Replica) -> None:
        """Send requests to one more replica.

        Raises: ConfigError for an id in use, or when it runs another model than the others.
        """
        self._core.adapters.joined(self._core.fleet.add(replica))
        self._core.gate.wake()

    def drain(self, replica_id: str) -> None:
        """Send nothing new to a replica. Raises: NotFoundError."""
        self._seat(replica_id).is_draining = True

    async def remove(self, replica_id: str, *, drain_s: float = 30.0) -> None:
        """Drain a replica, wait for its requests, close it.

        What is not over after `drain_s` goes on from other replicas. Raises: NotFoundError.
        """
        seat = self._seat(replica_id)
        seat.is_draining = True
        until_s = self._core.fleet.clock() + drain_s
        while seat.in_flight and self._core.fleet.clock() < until_s:
            await asyncio.sleep(_DRAIN_LOOK_S)
        self._core.fleet.drop(seat)
        await seat.replica.client.close()

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`, from as many replicas as it takes.

        Raises: UserError subclasses for a bad request; OverloadedError when none has room in time;
        EngineDiedError when no replica is left.
        """
        call = StreamCall(self._core, request, self._chips)
        try:
            await call.begin()
            while True:
                try:
                    delta = await call.next()
                except LOST as exc:
                    await call.move(exc)
                    continue
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            await call.close()

    async def encode(self, request: Encode) -> Encoded:
        """Return one row for each sequence; sent whole to another replica when one is lost.

        Raises: like `generate`.
        """
        return await EncodeCall(self._core, request, self._chips).run()

    async def stats(self) -> EngineStats:
        """Return the sums over the replicas that answer. Raises: EngineDiedError when none does."""
        seats = self._core.fleet.of(self._chips)
        answers = await asyncio.gather(*(self._stats_of(seat) for seat in seats))
        known = [answer for answer in answers if answer is not None]
        if not known:
            raise self._core.gate.unavailable(self._chips)
        names = [name for name in EngineStats.__struct_fields__ if name != "request_id"]
        sums: dict[str, Any] = {name: sum(getattr(item, name) for item in known) for name in names}
        return EngineStats(**sums)

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded:
        """Load an adapter on every replica of the pool, also on those of other chips.

        All or nothing: where one refuses it, the others forget it again. A replica that is down
        gets it when it is back. Raises: what a replica raised; UnsupportedError.
        """
        return await self._core.adapters.load(request)

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded:
        """Forget an adapter everywhere. Raises: NotFoundError."""
        return await self._core.adapters.unload(request)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that the pool keeps loaded on every replica."""
        return self._core.adapters.names

    async def close(self) -> None:
        """Close the replicas, all at the same time; a view closes nothing."""
        if self._chips is not None:
            return
        await self._core.prober.close()
        await self._core.adapters.close()
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    async def _stats_of(self, seat: Seat) -> EngineStats | None:
        if not seat.replica.client.is_healthy:
            return None
        try:
            async with asyncio.timeout(self._core.fleet.rules.probe_limit_s * 0.75):
                stats = await seat.replica.client.stats()
        except (TimeoutError, MxnError):
            return None  # its counters are missing from the sum until it answers again
        seat.see(stats)
        return stats

    def _seat(self, replica_id: str) -> Seat:
        seat = self._core.fleet.get(replica_id)
        if seat is None:
            known = [replica.id for replica in self.replicas]
            raise NotFoundError(f"there is no replica {replica_id!r}; there are {known}")
        return seat


def _basis_of(seat: Seat) -> CountBasis:
    return getattr(seat.replica.client, "count_basis", "engine")
