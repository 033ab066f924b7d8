"""Lets requests in to a fleet: at once where there is room, else through the fair queue.

The waiting is here, who goes next is decided by `routing.admission`. Knows no streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.errors import EngineDiedError
from mxn.serve.context import RequestContext
from mxn.serve.fleet import Fleet, Seat, named
from mxn.serve.routing.admission import Admission, Chips, Entry, Target
from mxn.serve.routing.policy import Choice

_RETRY_S = 1.0  # a replica that died is back in seconds, if at all


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """What a request asks for."""

    entry: Entry
    prompt_ids: Sequence[int] = ()
    chips: Chips = None
    adapter: str | None = None
    barred: tuple[str, ...] = ()  # replicas that cannot do what it asks for
    beside: str = ""  # the chip that another part of the same request runs on


Granted = tuple[Seat, Choice]


class Gate:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.admission = Admission(fleet.rules.admission)
        self._waiting: dict[Entry, tuple[Asked, asyncio.Future[Granted]]] = {}

    async def enter(self, asked: Asked) -> Granted:
        """Return a seat; pair it with `leave`.

        Raises: EngineDiedError when no replica is there, or those that are there stay held back
        for their failures; OverloadedError when all are full and the queue is, or the deadline
        passed.
        """
        if not len(self.admission):
            granted = self._pick(asked)
            if granted is not None:
                self.admission.admit(asked.entry)
                return granted
        limit_s = float("inf")
        if not self._fleet.has_any(asked.chips, asked.barred):
            if not self._fleet.is_held_back(asked.chips, asked.barred):
                raise self.unavailable(asked.chips)
            limit_s = self._fleet.rules.recover_s
        return await self._wait(asked, limit_s)

    def leave(self, seat: Seat, entry: Entry, tokens: float) -> None:
        """The request is over; `tokens` is what it really used."""
        self._fleet.release(seat)
        self.admission.ended(entry, tokens, self._fleet.clock())
        self.wake()

    def gave_up(self, entry: Entry, tokens: float) -> None:
        """The request is over while it had no seat."""
        self.admission.ended(entry, tokens, self._fleet.clock())

    def wake(self) -> None:
        """Let in whom there is room for; also to be called when replicas come or go."""
        while len(self.admission):
            entry = self.admission.next(self._has_room)
            if entry is None:
                return
            asked, future = self._waiting.pop(entry)
            granted = None if future.done() else self._pick(asked)
            if granted is None:
                self.admission.ended(entry, 0.0, self._fleet.clock())
            else:
                future.set_result(granted)

    def unavailable(self, chips: Chips) -> EngineDiedError:
        where = f" on {named(chips)}" if chips else ""
        return EngineDiedError(
            f"no replica{where} is up: {self._fleet.states(chips)}",
            hint="the server tries to bring them back; send the request again",
            retry_after_s=_RETRY_S,
        )

    def _pick(self, asked: Asked) -> Granted | None:
        return self._fleet.pick(
            asked.prompt_ids,
            chips=asked.chips,
            excluded=asked.barred,
            adapter=asked.adapter,
            beside=asked.beside,
        )

    def _has_room(self, target: Target) -> bool:
        chips, barred = target if isinstance(target, tuple) else (target, ())
        return self._fleet.has_room(chips, barred)

    async def _wait(self, asked: Asked, limit_s: float) -> Granted:
        """`limit_s`: how long to wait for a replica that is held back."""
        entry, now_s = asked.entry, self._fleet.clock()
        victim = self.admission.wait(entry, now_s)
        if victim is not None:
            _, future = self._waiting.pop(victim)
            why = "another tenant's request took its place in the queue"
            future.set_exception(self.admission.overloaded(why))
        future = asyncio.get_running_loop().create_future()
        self._waiting[entry] = asked, future
        self.wake()  # there may be room that the requests before this one cannot use
        try:
            if await _comes(future, min(limit_s, entry.deadline_s - now_s)):
                return future.result()
            if limit_s < entry.deadline_s - now_s:
                if not self._fleet.has_any(asked.chips, asked.barred):
                    self._forget(entry, future)
                    raise self.unavailable(asked.chips)
                if await _comes(future, entry.deadline_s - now_s - limit_s):
                    return future.result()
        except asyncio.CancelledError:
            self._forget(entry, future)
            raise
        self._forget(entry, future)
        waited_s = self._fleet.clock() - now_s
        raise self.admission.overloaded(f"it waited {waited_s:.1f} s in the queue")

    def _forget(self, entry: Entry, future: asyncio.Future[Granted]) -> None:
        """Undo a wait that ended early, also where a seat was granted in the same moment."""
        if entry in self._waiting:
            del self._waiting[entry]
            self.admission.remove(entry)
        elif future.done() and not future.cancelled() and future.exception() is None:
            seat, _ = future.result()
            seat.breaker.abandoned()
            self.leave(seat, entry, 0.0)


async def _comes(future: asyncio.Future[Granted], limit_s: float) -> bool:
    """Wait for a seat; return whether it, or a refusal, came in time."""
    timeout_s = None if limit_s == float("inf") else max(0.0, limit_s)
    done, _ = await asyncio.wait({future}, timeout=timeout_s)
    return bool(done)


def entry_of(
    context: RequestContext,
    cost: float,
    priority: int,
    chips: Chips,
    barred: tuple[str, ...] = (),
) -> Entry:
    """Return the queue's view of a request; without a key all requests are one tenant's."""
    principal = context.principal
    target = (chips, barred) if barred else chips
    deadline_s = float("inf") if context.deadline_s is None else context.deadline_s
    if principal is None:
        return Entry(tenant="", cost=cost, priority=priority, deadline_s=deadline_s, target=target)
    return Entry(
        tenant=f"{principal.org_id}/{principal.project_id}",
        cost=cost,
        weight=principal.weight,
        priority=priority,  # the tenant's own is in the request's already
        deadline_s=deadline_s,
        target=target,
    )
