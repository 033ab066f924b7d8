"""One request on its way through replicas: a seat, its deltas, and a move when it is lost.

`StreamCall` and `EncodeCall` hold the state of a request of `PooledClient`; they note each replica
as a hop of the request's context. Decisions are in `fleet.py`, `gate.py` and `routing`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from mxn.engine.protocol import Delta, Encode, Encoded, Generate
from mxn.errors import (
    CapacityError,
    ChipError,
    EngineDiedError,
    InternalError,
    OverloadedError,
    UnsupportedError,
)
from mxn.serve.context import Hop, current
from mxn.serve.fleet import Clock, Fleet, PoolRules, Seat
from mxn.serve.gate import Asked, Gate, entry_of
from mxn.serve.pool_adapters import CHANGING, AdapterAway, PoolAdapters
from mxn.serve.prober import Prober
from mxn.serve.routing.admission import Chips
from mxn.serve.routing.seam import Seam
from mxn.serve.watch import Stalled, Watch

# What another replica may do better. A full engine says so with a CapacityError, and so does one
# that refuses what can never fit; `_is_final` tells them apart.
LOST = (EngineDiedError, ChipError, InternalError, OverloadedError, CapacityError, Stalled)

_UNKNOWN_TOKENS = 256  # expected of a request that names no limit
_MEASURE_S = 0.25  # of a stream between two notes to the replica's measurements
_RETRY_S = 1.0  # told to a client when it is not known what would help
_MAX_WHY_CHARS = 200  # of an error, in logs and hops
_MAX_DOUBTED = 2  # replicas that may answer one request with an error before it is given up
_LOOK_AGAIN_S = 0.1  # between two looks for a replica that comes back


class Core:
    """What all views of a pool share."""

    def __init__(self, rules: PoolRules, clock: Clock) -> None:
        self.fleet = Fleet(rules, clock)
        self.gate = Gate(self.fleet)
        self.adapters = PoolAdapters(self.fleet)
        self.prober = Prober(self.fleet, self.adapters, self.gate.wake)
        self._closing: set[asyncio.Task[Any]] = set()

    def close_aside(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run the clean-up of a lost replica without waiting for it."""
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[Any]) -> None:
        self._closing.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the replica is lost, and so is what it says at its end


class _Call:
    """What streams and encodings have in common: a seat, hops, losses."""

    def __init__(
        self, core: Core, chips: Chips, cost: float, priority: int, request: Generate | Encode
    ) -> None:
        """Raises: UnsupportedError when no replica has what the request asks for."""
        self._core = core
        self._barred = core.fleet.barred(chips, request)  # replicas that cannot take it
        self._chips = chips
        self._context = current()
        self._entry = entry_of(self._context, cost, priority, chips, self._barred)
        self._seat: Seat | None = None
        self._is_in = False
        self._num_attempts = 0
        self._lost: list[str] = []  # replicas this request will not go to again
        self._ruled_out: set[str] = set()  # of those, the ones it does not even wait for
        # Replicas that answered with an error and live: theirs is the fault only if another can do
        # what they could not; where two fail, it is the request's.
        self._doubted: list[tuple[Seat, str]] = []

    @property
    def _rules(self) -> PoolRules:
        return self._core.fleet.rules

    def _has_other(self) -> bool:
        seat = self._seat
        away = [*self._lost, *self._barred, *([] if seat is None else [seat.id])]
        return self._core.fleet.has_any(self._chips, away)

    def _gives_up(self, waited_s: float, limit_s: float) -> bool:
        """A silent replica is left when another can go on, or when all hope is gone."""
        return self._has_other() or waited_s >= self._rules.last_hope * limit_s

    def _hop(
        self, seat: Seat, reason: str, resumed_tokens: int = 0, *, is_takeover: bool = False
    ) -> None:
        replica = seat.replica
        hop = Hop(
            replica=replica.id,
            chip=replica.chip,
            device=replica.device,
            reason=reason,
            resumed_tokens=resumed_tokens,
            is_takeover=is_takeover,
        )
        self._context.hops.append(hop)

    def _beside(self) -> str:
        hops = self._context.hops
        return hops[0].chip if hops else ""

    async def _enter(self, asked: Asked) -> Seat:
        self._core.prober.ensure_running()
        clock = self._core.fleet.clock
        begun_s = clock()
        try:
            seat, choice = await self._core.gate.enter(asked)
        finally:
            waited_s = clock() - begun_s
            self._context.upstream_s += waited_s
            self._context.queue_s += waited_s
        self._seat = seat
        self._is_in = True
        self._num_attempts = 1
        self._hop(seat, choice.reason)
        return seat

    def _whole_limit_s(self, seat: Seat, num_tokens: int) -> float:
        """Return how long a prompt, or a whole encoding, may take."""
        rules, speed = self._rules, seat.speed
        usual_s = max(speed.first_token_s or 0.0, (speed.prefill_token_s or 0.0) * num_tokens)
        return max(rules.first_token_floor_s, rules.k_gap * usual_s)

    def _end_of(self, exc: Exception) -> Exception:
        """Return what a client is told when no replica is left."""
        tried = f"{self._num_attempts} attempts; {self._core.fleet.states(self._chips)}"
        if isinstance(exc, Stalled):
            return EngineDiedError(f"a replica stalled ({tried})", retry_after_s=_RETRY_S)
        if self._num_attempts == 1 or not isinstance(exc, EngineDiedError):
            return exc
        retry_s = exc.retry_after_s if exc.retry_after_s is not None else _RETRY_S
        return EngineDiedError(f"{exc.message} ({tried})", hint=exc.hint, retry_after_s=retry_s)

    def _lose(self, exc: BaseException) -> Seat | None:
        """Note that the seat's replica is lost to this request, and leave it."""
        seat, self._seat = self._seat, None
        if seat is None:
            return None
        self._core.fleet.release(seat)
        seat.num_lost += 1
        self._lost.append(seat.id)
        if isinstance(exc, Stalled | InternalError):
            self._ruled_out.add(seat.id)
        if isinstance(exc, OverloadedError | CapacityError | AdapterAway):
            # To be full, to refuse a bad request or to load an adapter is not to be ill.
            seat.breaker.abandoned()
        elif isinstance(exc, InternalError):
            self._doubted.append((seat, _why(exc)))
            self._core.fleet.doubted(seat, _why(exc))
        else:
            self._core.fleet.failed(seat, _why(exc))
        return seat

    def _worked(self, seat: Seat) -> None:
        """The seat's replica gave a first token, or a whole result."""
        self._core.fleet.worked(seat)
        for other, why in self._doubted:
            self._core.fleet.failed(other, why)
        self._doubted.clear()

    def _is_over(self, exc: BaseException) -> bool:
        """Whether no other replica is to be tried: it is the request that fails."""
        return _is_final(exc) or len(self._doubted) >= _MAX_DOUBTED

    def _take_other(self, prompt_ids: list[int], adapter: str | None) -> Seat | None:
        """Sit down at another replica, whether it has room or not."""
        granted = self._core.fleet.pick(
            prompt_ids,
            chips=self._chips,
            excluded=[*self._lost, *self._barred],
            adapter=adapter,
            beside=self._beside(),
            ignores_room=True,
        )
        if granted is None:
            return None
        self._seat = granted[0]
        self._num_attempts += 1
        return self._seat

    def _leave(self, tokens: float) -> None:
        """The request is over, wherever it is."""
        if not self._is_in:
            return
        self._is_in = False
        seat, self._seat = self._seat, None
        if seat is None:
            self._core.gate.gave_up(self._entry, tokens)
        else:
            seat.breaker.abandoned()
            self._core.gate.leave(seat, self._entry, tokens)


class StreamCall(_Call):
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
        reason = f"resumed {resumed} tokens: {_why(exc)}"
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
                f"and its replica was lost: {_why(exc)}",
                hint="send the request again",
                retry_after_s=_RETRY_S,
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


class EncodeCall(_Call):
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
        self._hop(seat, f"again: {_why(exc)}", is_takeover=True)
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


@dataclass(slots=True, kw_only=True)
class _Leg:
    """The part of a stream that one replica makes."""

    deltas: AsyncIterator[Delta]
    watch: Watch
    meter: Meter


class Meter:
    """Measures one stream on one replica, a few notes each second."""

    __slots__ = (
        "_clock", "_last_s", "_load", "_new_tokens", "_noted_s", "_num_deltas", "_num_tokens",
        "_sent_s", "_took_s", "is_first", "seat",
    )  # fmt: skip

    def __init__(self, seat: Seat, prompt_tokens: int, clock: Clock) -> None:
        self.seat = seat
        self.is_first = True
        self._clock = clock
        self._new_tokens = prompt_tokens
        self._load = float(seat.load)
        self._sent_s = self._last_s = self._noted_s = clock()
        self._took_s, self._num_tokens, self._num_deltas = 0.0, 0, 0

    def note(self, delta: Delta, waited_s: float) -> None:
        """Count a delta. One that had come before it was asked for says nothing of the replica."""
        now_s = self._clock()
        self.seat.num_tokens += len(delta.token_ids)
        if self.is_first:
            self.is_first = False
            new_tokens = self._new_tokens - delta.cached_tokens
            self.seat.speed.first_token(now_s - self._sent_s, new_tokens)
        elif 2 * waited_s >= now_s - self._last_s:
            self._took_s += now_s - self._last_s
            self._num_tokens += len(delta.token_ids)
            self._num_deltas += 1
        self._last_s = now_s
        if now_s - self._noted_s >= _MEASURE_S or delta.finish_reason is not None:
            self._write(now_s)

    def _write(self, now_s: float) -> None:
        self._noted_s = now_s
        load = float(self.seat.load)
        if self._num_tokens and self._took_s > 0:
            mean_load = (self._load + load) / 2
            self.seat.speed.tokens(
                now_s, self._took_s, self._num_tokens, self._num_deltas, mean_load
            )
        self._load = load
        self._took_s, self._num_tokens, self._num_deltas = 0.0, 0, 0


def _is_final(exc: BaseException) -> bool:
    """Whether it is the caller's fault: a CapacityError, unless a full engine says it."""
    return isinstance(exc, CapacityError) and exc.code != "overloaded"


def _why(exc: BaseException) -> str:
    if isinstance(exc, Stalled):
        return "it stalled"
    return (str(exc).splitlines() or [type(exc).__name__])[0][:_MAX_WHY_CHARS]


async def _aclose(deltas: AsyncIterator[Delta]) -> None:
    close = getattr(deltas, "aclose", None)
    if close is not None:
        await close()


async def _ended(task: asyncio.Future[Any]) -> None:
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: nobody wants it any more
