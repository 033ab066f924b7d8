"""Answers that are made while nobody waits: begun, cancelled, stored, paid; and their end.

An answer is stored before it is paid for, and a database that is away is waited for, so that it is
paid exactly when it can be read. Knows no HTTP. Start at `Background.begin`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from mxn.errors import OverloadedError
from mxn.serve.chat.events import ChatRun
from mxn.serve.context import current
from mxn.serve.openai.errors import ApiError, from_exception
from mxn.serve.responses.answer import Builder
from mxn.serve.responses.held import HeldLedger, hold
from mxn.serve.responses.store import UNDER_WAY, ResponseStore, Stored
from mxn.serve.responses.types import InputItem

log = logging.getLogger("mxn.serve.responses")

Start = Callable[[], Awaitable[tuple[ChatRun, Builder]]]
Sweep = Callable[[Collection[str]], Collection[str]]
"""Makes answers final that nobody works on; given the ids under way here, returns those of them
that nobody will read. Blocking."""

MAX_UNDER_WAY = 64  # of one project
STOPPED = "The server stopped before this answer was done; ask again."
_RETRY_AFTER_S = 5
_SWEEP_S = 2.0
_STOP_S = 10.0
_PAUSE_S = (0.1, 2.0)  # between two attempts to store while the database is away
_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)


@dataclass(eq=False, slots=True)
class _Work:
    project: str
    run: ChatRun
    builder: Builder
    payment: HeldLedger | None
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    is_making: bool = True  # the model works; afterwards the answer is stored, come what may
    is_cancelled: bool = False
    marking: asyncio.Task[bool] | None = None

    def cancel(self) -> None:
        """End the model's work; what comes after it goes on."""
        if self.has_begun and self.is_making and not self.is_cancelled and self.task is not None:
            self.task.cancel()
        self.is_cancelled = True


class Background:
    """The answers under way in this process. `sweep` None: nobody else's can be seen here."""

    def __init__(
        self, store: ResponseStore, sweep: Sweep | None = None, *,
        max_under_way: int = MAX_UNDER_WAY, sweep_s: float = _SWEEP_S,
    ) -> None:  # fmt: skip
        self._store = store
        self._sweep = sweep
        self._max_under_way = max_under_way
        self._sweep_s = sweep_s
        self._places: Counter[str] = Counter()  # by project, also those that only begin
        self._known: set[str] = set()
        self._works: dict[tuple[str, str], _Work] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._give_up_s: float | None = None  # set when the server stops

    def start(self) -> None:
        """Look after what other servers left from now on, until `stop`."""
        if self._sweep is not None:
            self._sweeping = asyncio.create_task(self._keep_sweeping(self._sweep))

    async def begin(self, project: str, input: list[InputItem], start: Start) -> bytes:
        """Begin an answer and return it as JSON, `queued`. It is stored when this returns.

        Raises: ApiError 429 when too many are under way, OverloadedError when the server stops,
        and what `start` raises.
        """
        if self._give_up_s is not None:
            raise OverloadedError("the server is stopping")
        if self._places[project] >= self._max_under_way:
            raise _too_many(self._max_under_way)
        self._places[project] += 1
        payment = hold(current())
        response_id = ""
        try:
            run, builder = await start()
            response_id = run.id
            self._known.add(response_id)
            stored = Stored(response=builder.response, input=input)
            await asyncio.to_thread(self._store.put, project, stored)
        except BaseException:
            self._leave(project, response_id)
            raise
        queued = msgspec.json.encode(builder.response)
        work = _Work(project, run, builder, payment, is_cancelled=self._give_up_s is not None)
        self._works[project, response_id] = work
        work.task = asyncio.create_task(self._work(work), name=f"mxn-background-{response_id}")
        return queued

    async def cancel(self, project: str, response_id: str) -> None:
        """Return when an answer is final, wherever it is made."""
        work = self._works.get((project, response_id))
        if work is not None and work.task is not None:
            work.cancel()
            await asyncio.wait({work.task})
        else:
            await asyncio.to_thread(self._store.cancel, response_id, project)

    def drop(self, project: str, response_id: str) -> None:
        """End the work for an answer that nobody will read."""
        if (work := self._works.get((project, response_id))) is not None:
            work.cancel()

    async def stop(self, limit_s: float = _STOP_S) -> None:
        """End what is under way: cancelled, stored as failed and settled, within `limit_s`.

        What cannot be stored in time is made final by another server or the next start, unpaid.
        """
        self._give_up_s = time.monotonic() + limit_s
        if self._sweeping is not None:
            self._sweeping.cancel()
        for work in self._works.values():
            work.cancel()
        tasks = {work.task for work in self._works.values() if work.task is not None}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=limit_s)
        for task in late:
            task.cancel()
        if late:
            log.error("%d background answers were not final in %g s", len(late), limit_s)
            await asyncio.wait(late, timeout=1.0)

    async def _work(self, work: _Work) -> None:
        try:
            await self._make(work)
            await self._finish(work)
        except Exception:
            log.exception("the background answer %s is not settled", work.run.id)
        finally:
            del self._works[work.project, work.run.id]
            self._leave(work.project, work.run.id)

    def _leave(self, project: str, response_id: str) -> None:
        self._known.discard(response_id)
        self._places[project] -= 1
        if not self._places[project]:
            del self._places[project]

    async def _make(self, work: _Work) -> None:
        """Have the model answer; the builder holds what came of it, whatever that is."""
        run, builder = work.run, work.builder
        work.has_begun = True
        try:
            if work.is_cancelled:
                raise asyncio.CancelledError
            async with aclosing(run.events()) as events:
                async for event in events:
                    if work.marking is None:
                        self._mark(work)
                    builder.add(event)
            builder.end(run.usage())
        except asyncio.CancelledError:
            if builder.response.status not in UNDER_WAY:  # it was done, and is paid as a whole
                builder.end(run.usage())
            elif self._give_up_s is not None:
                builder.fail("server_error", STOPPED, run.usage())
            else:
                builder.cancel(run.usage())
        except Exception as exc:
            error = from_exception(exc)
            builder.fail(error.code or "server_error", error.message, run.usage())
        if builder.response.status in ("cancelled", "failed"):  # is not paid: cannot be read either
            builder.response.output = []
            builder.response.usage = None
        work.is_making = False

    def _mark(self, work: _Work) -> None:
        """Say in the store that it has begun, beside the work: the model waits for no database."""
        work.builder.begin()
        shown = msgspec.structs.replace(work.builder.response)  # the object itself grows
        storing = asyncio.to_thread(self._store.replace, work.project, shown)
        work.marking = asyncio.create_task(storing)

    async def _finish(self, work: _Work) -> None:
        if work.marking is not None:
            await asyncio.wait({work.marking})  # it must not come after the end
            if (error := work.marking.exception()) is not None:
                log.warning("%s could not be shown as in progress: %s", work.run.id, error)
        is_readable = await self._store_patiently(work)
        if is_readable is not None and work.payment is not None:
            await work.payment.release(is_readable=is_readable)

    async def _store_patiently(self, work: _Work) -> bool | None:
        """Store the final answer, waiting for a database that is away.

        Returns False when it cannot be read: it was deleted or given up. None: that is not known.
        """
        pause_s, longest_s = _PAUSE_S
        while True:
            try:
                response = work.builder.response
                return await asyncio.to_thread(self._store.replace, work.project, response)
            except _AWAY as error:
                log.warning("the database is away, %s is stored later: %s", work.run.id, error)
            except SQLAlchemyError:
                log.exception("the database refuses the answer %s", work.run.id)
                return False
            if self._give_up_s is not None and time.monotonic() + pause_s > self._give_up_s:
                log.error("%s is not stored and stays unpaid: the server stops", work.run.id)
                return None
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, longest_s)

    async def _keep_sweeping(self, sweep: Sweep) -> None:
        is_away = False
        while True:
            try:
                taken = await asyncio.to_thread(sweep, frozenset(self._known))
                for work in [one for one in self._works.values() if one.run.id in taken]:
                    work.cancel()
                is_away = False
            except SQLAlchemyError as error:
                if not is_away:
                    log.warning("answers of other servers cannot be looked at: %s", error)
                is_away = True
            except Exception:  # such as a row that cannot be read: the others must not wait for it
                log.exception("looking after answers of other servers failed")
            await asyncio.sleep(self._sweep_s)


def _too_many(limit: int) -> ApiError:
    return ApiError(
        f"{limit} background responses of this project are under way, which is the limit; "
        "wait until one is done, or cancel one.",
        status=429,
        type="rate_limit_error",
        code="too_many_background_responses",
        headers={"retry-after": str(_RETRY_AFTER_S)},
    )
