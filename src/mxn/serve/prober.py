"""Looks at every replica from time to time, so that an idle one is known to be well.

A busy replica proves itself by its tokens: that it answers late is no sign of illness.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from mxn.errors import MxnError
from mxn.serve.fleet import Fleet, Seat
from mxn.serve.pool_adapters import PoolAdapters

_JITTER = 0.2


class Prober:
    """Runs while an event loop uses the pool; `on_round` is called after each look at all."""

    def __init__(self, fleet: Fleet, adapters: PoolAdapters, on_round: Callable[[], None]) -> None:
        self._fleet = fleet
        self._adapters = adapters
        self._on_round = on_round
        self._task: asyncio.Task[None] | None = None

    def ensure_running(self) -> None:
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        self._task = None

    async def look_at_all(self) -> None:
        await asyncio.gather(*(self._look(seat) for seat in self._fleet))
        self._on_round()

    async def _run(self) -> None:
        while True:
            spread = random.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(self._fleet.rules.probe_s * spread)
            await self.look_at_all()

    async def _look(self, seat: Seat) -> None:
        client, clock = seat.replica.client, self._fleet.clock
        if not client.is_healthy:
            self._fleet.failed_probe(seat, "it is down")
            self._adapters.lost(seat)
            return
        was_busy = seat.in_flight > 0
        try:
            async with asyncio.timeout(self._fleet.rules.probe_limit_s):
                stats = await client.stats()
        except (TimeoutError, MxnError) as exc:
            if not (was_busy or seat.in_flight) or not client.is_healthy:
                self._fleet.failed_probe(seat, f"no answer to a probe: {exc!r}")
            return
        seat.see(stats)
        seat.health.good(clock())
        self._adapters.wake(seat)
