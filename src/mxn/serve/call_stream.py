"""A `Generate` on its way through the replicas of a pool: its deltas, and a move when one is lost.

What it has in common with encodings is in `call.py`; how two parts of an answer join is decided in
`routing.seam`. Start at `StreamCall.next` and `StreamCall.move`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from mxn.engine.protocol import Delta, Generate
from mxn.errors import EngineDiedError, UnsupportedError
from mxn.serve.call import RETRY_S, Call, Core, why
from mxn.serve.call_meter import Meter
from mxn.serve.fleet import Seat
from mxn.serve.gate import Asked
from mxn.serve.pool_adapters import CHANGING, AdapterAway
from mxn.serve.routing.admission import Chips
from mxn.serve.routing.seam import Seam
from mxn.serve.watch import Watch

_UNKNOWN_TOKENS = 256  # expected of a request that names no limit
_LOOK_AGAIN_S = 0.1  # between two looks for a replica that comes back


class StreamCall(Call):
    """A `Generate` under way. Order: begin, then next and move as often as needed, then close."""

    def __init__(self, core: Core, request: Generate, chips: Chips) -> None:
        limit = request.sampling.max_tokens
        cost = len(request.prompt_ids) + (_UNKNOWN_TOKENS if limit is None else limit)
        super().__init__(core, chips, cost, request.priority, request)
        self._request = request
        self._seam = Seam(request)
        self._leg: _Leg | None = None
        self._version: int | None = None  # of the adapter's weights that the answer began with

    async def begin(self) -> None:
        """Wait for a seat and send the request there."""
        request = self._request
        asked = Asked(
            entry=self._entry,
            prompt_ids=request.prompt_ids,
            chips=self._chips,
            adapter=request.adapter,
            barred=self._barred,
            beside=self._beside(),
        )
        seat = await self._enter(asked)
        self._send(seat, request)

    async def next(self) -> Delta | None:
        """Return the next delta as the client gets it; None: nothing new was in it.

        Raises: one of LOST when another replica may do better; UserError.
        """
        leg = self._leg
        assert leg is not None, "begin comes first"
        watch, meter = leg.watch, leg.meter
        try:
            delta = await watch.next(leg.deltas)
        except StopAsyncIteration:
            raise EngineDiedError("a replica ended an answer before its last token") from None
        finally:
            self._context.upstream_s += watch.waited_s
        if delta.finish_reason == "cancelled":
            raise EngineDiedError("a replica cancelled the request")
        joined = self._seam.take(delta)
        if meter.is_first:
            self._worked(meter.seat)
            self._core.gate.wake()  # some wait for a sign of life from a replica that had failed
            watch.set_limit(self._gap_limit_s(meter.seat))
        meter.note(delta, watch.waited_s)
        return joined

    async def move(self, exc: Exception) -> None:
        """Go on from another replica. Raises: `exc`, or what is to be said when none is left."""
        self._drop()
        if self._lose(exc) is None or self._is_over(exc):
            raise exc
        self._check_adapter(exc)
        self._bar_again(exc)
        clock = self._core.fleet.clock
        # One that lacks an adapter is given it: it may be the only one there is.
        may_wait = self._seam.has_begun or isinstance(exc, AdapterAway)
        may_wait = may_wait or self._core.fleet.is_held_back(
            self._chips, [*self._lost, *self._barred]
        )
        may_wait = may_wait and self._core.fleet.has_other(self._chips, self._ruled_out)
        until_s = clock() + (self._rules.recover_s if may_wait else 0.0)
        while (seat := self._next_seat()) is None:
            if self._num_attempts >= self._rules.max_attempts or clock() >= until_s:
                raise self._end_of(exc) from exc
            await asyncio.sleep(_LOOK_AGAIN_S)
            self._lost = [name for name in self._lost if name in self._ruled_out]
        resumed = self._seam.num_tokens
        reason = f"resumed {resumed} tokens: {why(exc)}"
        self._hop(seat, reason, resumed, is_takeover=True)
        self._send(seat, self._seam.move())

    async def close(self) -> None:
        """Free the seat, and cancel the request where it still runs."""
        leg, self._leg = self._leg, None
        self._leave(len(self._request.prompt_ids) + self._seam.num_tokens)
        if leg is not None:
            leg.watch.close()
            await _aclose(leg.deltas)

    def _send(self, seat: Seat, request: Generate) -> None:
        clock = self._core.fleet.clock
        prompt_tokens = len(request.prompt_ids) + len(request.resume_ids)
        limit_s = self._whole_limit_s(seat, prompt_tokens)
        if not self._seam.has_begun:
            self._version = self._core.adapters.version(request.adapter)
        self._leg = _Leg(
            deltas=self._core.adapters.stream(seat, request),
            watch=Watch(limit_s, self._gives_up, clock),
            meter=Meter(seat, prompt_tokens, clock),
        )

    def _bar_again(self, exc: Exception) -> None:
        """Leave out those that could begin this request and cannot go on with it. Raises: `exc`."""
        resumes = self._seam.num_tokens > 0
        try:
            self._barred = self._core.fleet.barred(self._chips, self._request, resumes=resumes)
        except UnsupportedError:
            raise self._end_of(exc) from exc

    def _check_adapter(self, exc: Exception) -> None:
        """Raises: EngineDiedError where an answer would go on with other weights."""
        name = self._request.adapter
        if name is None or not self._seam.has_begun:
            return
        if self._version == CHANGING or self._core.adapters.version(name) != self._version:
            raise EngineDiedError(
                f"adapter {name!r} was replaced or unloaded while this answer was made with it, "
                f"and its replica was lost: {why(exc)}",
                hint="send the request again",
                retry_after_s=RETRY_S,
            ) from exc

    def _drop(self) -> None:
        """Let go of a replica's stream; its clean-up must hold nobody up."""
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.watch.close()
            self._core.close_aside(_aclose(leg.deltas))

    def _next_seat(self) -> Seat | None:
        if self._num_attempts >= self._rules.max_attempts:
            return None
        return self._take_other(self._request.prompt_ids, self._request.adapter)

    def _gap_limit_s(self, seat: Seat) -> float:
        rules = self._rules
        return max(rules.stall_floor_s, rules.k_gap * (seat.speed.delta_gap_s or 0.0))


@dataclass(slots=True, kw_only=True)
class _Leg:
    """The part of a stream that one replica makes."""

    deltas: AsyncIterator[Delta]
    watch: Watch
    meter: Meter


async def _aclose(deltas: AsyncIterator[Delta]) -> None:
    close = getattr(deltas, "aclose", None)
    if close is not None:
        await close()
