"""An `Encode` on its way through the replicas of a pool: tried whole, then whole again elsewhere.

What it has in common with streams is in `call.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from mxn.engine.protocol import Encode, Encoded
from mxn.serve.call import LOST, Call, Core, why
from mxn.serve.fleet import Seat
from mxn.serve.gate import Asked
from mxn.serve.routing.admission import Chips
from mxn.serve.watch import Stalled


class EncodeCall(Call):
    """An `Encode` under way: tried whole, then whole again elsewhere."""

    def __init__(self, core: Core, request: Encode, chips: Chips) -> None:
        self._num_tokens = sum(len(ids) for ids in request.sequences)
        super().__init__(core, chips, self._num_tokens, 0, request)
        self._request = request

    async def run(self) -> Encoded:
        """Return the rows. Raises: like `PooledClient.encode`."""
        try:
            asked = Asked(entry=self._entry, chips=self._chips, barred=self._barred)
            seat = await self._enter(asked)
            while True:
                try:
                    return await self._try(seat)
                except LOST as exc:
                    seat = self._other(exc)
        finally:
            self._leave(self._num_tokens)

    def _other(self, exc: Exception) -> Seat:
        """Return the seat to try next. Raises: `exc`, or what is to be said at the end."""
        if self._lose(exc) is None or self._is_over(exc):
            raise exc
        if self._num_attempts >= self._rules.max_attempts:
            raise self._end_of(exc) from exc
        seat = self._take_other([], None)
        if seat is None:
            raise self._end_of(exc) from exc
        self._hop(seat, f"again: {why(exc)}", is_takeover=True)
        return seat

    async def _try(self, seat: Seat) -> Encoded:
        clock = self._core.fleet.clock
        limit_s = self._whole_limit_s(seat, self._num_tokens)
        begun_s = clock()
        task = asyncio.ensure_future(seat.replica.client.encode(self._request))
        try:
            while not (await asyncio.wait({task}, timeout=limit_s))[0]:
                if self._gives_up(clock() - begun_s, limit_s):
                    raise Stalled
        finally:
            self._context.upstream_s += clock() - begun_s
            if not task.done():
                task.cancel()
                self._core.close_aside(_ended(task))
        encoded = task.result()
        self._worked(seat)
        seat.speed.first_token(clock() - begun_s, self._num_tokens)
        return encoded


async def _ended(task: asyncio.Future[Any]) -> None:
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: nobody wants it any more
