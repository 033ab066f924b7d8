"""What any request of a pool needs on its way: a seat, hops, and what is noted when it is lost.

Holds what the views of a pool share (`Core`) and the common part of `call_stream.py` and
`call_encode.py`. Each replica is noted as a hop of the request's context. Decisions are in
`fleet.py`, `gate.py` and `routing`; knows no deltas and no vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from mxn.engine.protocol import Encode, Generate
from mxn.errors import CapacityError, ChipError, EngineDiedError, InternalError, OverloadedError
from mxn.serve.context import Hop, current
from mxn.serve.fleet import Clock, Fleet, PoolRules, Seat
from mxn.serve.gate import Asked, Gate, entry_of
from mxn.serve.pool_adapters import AdapterAway, PoolAdapters
from mxn.serve.prober import Prober
from mxn.serve.routing.admission import Chips
from mxn.serve.watch import Stalled

# What another replica may do better. A full engine says so with a CapacityError, and so does one
# that refuses what can never fit; `_is_final` tells them apart.
LOST = (EngineDiedError, ChipError, InternalError, OverloadedError, CapacityError, Stalled)

RETRY_S = 1.0  # told to a client when it is not known what would help
_MAX_WHY_CHARS = 200  # of an error, in logs and hops
_MAX_DOUBTED = 2  # replicas that may answer one request with an error before it is given up


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


class Call:
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
            return EngineDiedError(f"a replica stalled ({tried})", retry_after_s=RETRY_S)
        if self._num_attempts == 1 or not isinstance(exc, EngineDiedError):
            return exc
        retry_s = exc.retry_after_s if exc.retry_after_s is not None else RETRY_S
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
            self._doubted.append((seat, why(exc)))
            self._core.fleet.doubted(seat, why(exc))
        else:
            self._core.fleet.failed(seat, why(exc))
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


def _is_final(exc: BaseException) -> bool:
    """Whether it is the caller's fault: a CapacityError, unless a full engine says it."""
    return isinstance(exc, CapacityError) and exc.code != "overloaded"


def why(exc: BaseException) -> str:
    """Return one line on what became of a replica, for logs and hops."""
    if isinstance(exc, Stalled):
        return "it stalled"
    return (str(exc).splitlines() or [type(exc).__name__])[0][:_MAX_WHY_CHARS]
