"""The ledger of a gateway, on SQLite or PostgreSQL. Start at `SqlLedger`; `types.Ledger` says what
each method promises, and docs/design/0007-ledger.md what happens when something dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import UTC, tzinfo
from functools import partial
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from mxn.errors import AuthError, InternalError, OverloadedError
from mxn.ledger.aside import call_aside
from mxn.ledger.compose import compose_opening, compose_orphan, compose_settling
from mxn.ledger.database import Database
from mxn.ledger.keeper import Keeper
from mxn.ledger.moments import now_us
from mxn.ledger.operations import Batch, Opening, Settling
from mxn.ledger.periods import Periods
from mxn.ledger.rules import Rules, RulesCache
from mxn.ledger.sql import Store
from mxn.ledger.types import CloseReason, OpenUsage, Principal, Receipt, Settlement, Ticket
from mxn.ledger.writer import InlineWriter, ThreadWriter, Writer

log = logging.getLogger(__name__)

Mode = Literal["auto", "inline", "thread"]

_STALE_S = 0.5  # older rules are looked up anew before a key is let in
_UNKNOWN_S = 0.1  # between two looks for keys that are not known
_POLL_S = 0.2
_TICK_S = 0.1
_BUSY_MS = 2000
_GOODBYE_S = 5.0  # each, for the thread that writes and the one that keeps the books


class SqlLedger:
    """Belongs to one event loop, from its first use on. Times are in seconds.

    `open_timeout_s` is how long a request waits for a database that is away. `mode` says where
    transactions run; ``auto`` takes the event loop for SQLite without disk flushes, else a thread.
    `zone` is where days and months of budgets begin; `clock` returns µs of Unix time.
    """

    def __init__(
        self, database: Database, *, gateway_id: str | None = None, mode: Mode = "auto",
        zone: tzinfo = UTC, open_timeout_s: float = 5.0, close_timeout_s: float = 30.0,
        progress_s: float = 0.5, heartbeat_s: float = 2.0, lost_after_s: float = 10.0,
        clock: Callable[[], int] = now_us,
    ) -> None:  # fmt: skip
        self.database = database
        self.gateway_id = gateway_id or f"gw_{secrets.token_hex(8)}"
        is_inline = mode == "inline" or (
            mode == "auto" and database.is_sqlite and database.sync == "normal"
        )
        self.mode: Mode = "inline" if is_inline else "thread"
        self.cache = RulesCache(database)
        self.keeper = Keeper(
            database, self.cache, self.gateway_id, self._orphans,
            lambda usage_id: usage_id in self._open_ids, poll_s=_POLL_S,
            heartbeat_s=heartbeat_s, lost_after_s=lost_after_s,
        )  # fmt: skip
        self._now_us = clock
        self._periods = Periods(zone)
        self._open_timeout_s = open_timeout_s
        self._close_timeout_s = close_timeout_s
        self._progress_s = progress_s
        self._progress: dict[str, tuple[Any, ...]] = {}
        self._progress_due_s = 0.0
        self._num_noting = 0  # notes of progress on their way to the database
        self._opening: dict[Opening, None] = {}  # in order of their deadlines
        self._settling: dict[Settling, None] = {}
        self._open_ids: set[str] = set()  # rows of requests that are under way here
        self._looking: asyncio.Task[None] | None = None
        self._writer: Writer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._is_closing = False

    async def start(self) -> None:
        """Register the gateway and read what is in force. Called by the first use otherwise.

        Raises: OverloadedError when the database cannot be reached.
        """
        if self._writer is not None:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        try:
            await asyncio.shield(self._starting)
        except SQLAlchemyError as error:
            self._starting = None
            raise _away() from error

    async def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._prepare)
        make = InlineWriter if self.mode == "inline" else ThreadWriter
        self._writer = make(self._connect, self._deliver, self._loop)
        self._ticker = self._loop.call_later(_TICK_S, self._tick)

    def _prepare(self) -> None:
        self.cache.refresh()
        self.keeper.start()

    def _connect(self) -> Store:
        if self.database.is_sqlite:
            from mxn.ledger.sql_sqlite import SqliteStore

            # On the event loop, a wait for another process is a timer and not a sleep.
            return SqliteStore(self.database, busy_ms=0 if self.mode == "inline" else _BUSY_MS)
        from mxn.ledger.sql_postgres import PostgresStore

        return PostgresStore(self.database)

    async def authenticate(self, key: str) -> Principal:
        """See `Ledger.authenticate`. Raises also: OverloadedError when nothing can be looked up."""
        rules = await self._fresh()
        digest = hashlib.sha256(key.encode()).hexdigest()
        state = rules.key(digest)
        if state is None:
            state = (await self._newest()).key(digest)
        if state is None:
            raise AuthError("the API key is not known", hint="`mxn keys list` shows the known ones")
        now_us = self._now_us()
        if state.revoked_us is not None and state.revoked_us <= now_us:
            raise AuthError("the API key was revoked", hint="ask for a new one")
        if state.expires_us is not None and state.expires_us <= now_us:
            raise AuthError("the API key has expired", hint="ask for a new one")
        if not state.is_active:
            raise AuthError("the owner of this API key is disabled")
        self.keeper.used(state.principal.key_id, now_us)
        return state.principal

    async def _fresh(self) -> Rules:
        """Return rules that held within the last half second."""
        if self._writer is None:
            await self.start()
        if self.cache.checked_s < time.monotonic() - _STALE_S:
            await self._look()
        return self.cache.rules

    async def _newest(self) -> Rules:
        """Return rules as they were when this was called, or later: the key may just be made.

        However many unknown keys are tried, the database is asked a few times a second.
        """
        asked_s = time.monotonic()
        while self.cache.checked_s < asked_s:
            pause_s = self.cache.checked_s + _UNKNOWN_S - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            await self._look(asked_s)
        return self.cache.rules

    async def _look(self, newer_than_s: float | None = None) -> None:
        """Refresh the rules now; whoever asks meanwhile waits for the same look."""
        if self._looking is None or self._looking.done():
            if newer_than_s is None:
                newer_than_s = time.monotonic() - _STALE_S
            look = partial(self.cache.refresh, newer_than_s=newer_than_s)
            self._looking = asyncio.create_task(asyncio.to_thread(look))
        try:
            await asyncio.wait_for(asyncio.shield(self._looking), self._open_timeout_s)
        except (SQLAlchemyError, TimeoutError) as error:
            raise _away() from error

    async def open(self, usage: OpenUsage) -> Ticket:
        """See `Ledger.open`. Raises also: OverloadedError when the database is away too long."""
        rules = await self._fresh()
        if self._is_closing or self._writer is None:
            raise OverloadedError("the gateway is stopping")
        opening = compose_opening(
            rules, self._periods, usage, gateway_id=self.gateway_id, future=None,
            now_us=self._now_us(), deadline_s=time.monotonic() + self._open_timeout_s,
        )  # fmt: skip
        future = opening.future = self._loop.create_future()
        self._opening[opening] = None
        self._open_ids.add(usage.usage_id)
        self._writer.submit(opening, is_alone=len(self._open_ids) == 1)
        try:
            return await future
        except asyncio.CancelledError:
            opening.is_abandoned = True
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result())
            raise

    def progress(
        self, ticket: Ticket, input_tokens: int, output_tokens: int, *, chip: str = "",
        replica: str = "",
    ) -> None:  # fmt: skip
        """See `Ledger.progress`; `chip` is what tokens are priced by if this gateway dies."""
        usage_id, chips = ticket.usage.usage_id, ticket.usage.chips
        if not chip and len(chips) == 1:
            chip = chips[0]
        self._progress[usage_id] = (input_tokens, output_tokens, chip, replica, usage_id)

    async def settle(self, ticket: Ticket, settlement: Settlement) -> Receipt:
        """See `Ledger.settle`. Goes on when the caller is cancelled, and when the database is away
        it is kept and written in order once it is back."""
        if self._writer is None:
            await self.start()
        future = self._loop.create_future()
        self._settle(ticket, settlement, future)
        return await future

    def _settle(self, ticket: Ticket, settlement: Settlement, future: Any = None) -> None:
        self._progress.pop(ticket.usage.usage_id, None)
        now_us = self._now_us()
        self._submit_settling(
            compose_settling(self.cache.rules, ticket, settlement, now_us=now_us, future=future)
        )

    def _submit_settling(self, settling: Settling) -> None:
        if self._writer is None:
            raise InternalError("the ledger is closed; this request is settled by another gateway")
        self._settling[settling] = None
        self._writer.submit(settling, is_alone=len(self._open_ids) <= 1)

    def _release(self, ticket: Ticket) -> None:
        """Close a row that was opened for somebody who is gone."""
        self._settle(ticket, Settlement(reason="client_gone", status=499, num_replicas=0))

    def _orphans(self, rows: Iterable[Any], reason: CloseReason) -> None:
        """Settle rows that nobody else will. In the keeper's thread."""
        now_us = self._now_us()
        rules = self.cache.rules
        found = []
        for row in rows:
            try:
                found.append(compose_orphan(rules, row, reason=reason, now_us=now_us))
            except Exception:  # one that cannot be settled must not keep the others open
                log.exception("usage row %s cannot be settled", row.id)
        self._loop.call_soon_threadsafe(self._submit_orphans, found)

    def _submit_orphans(self, found: list[Settling]) -> None:
        if self._writer is not None and not self._is_closing:
            for settling in found:
                self._submit_settling(settling)

    def _deliver(self, batch: Batch) -> None:
        """Hand out what a transaction brought. On the event loop."""
        self._num_noting -= len(batch.progress)
        for opening in batch.openings:
            self._opening.pop(opening, None)
            outcome, future = opening.outcome, opening.future
            if not isinstance(outcome, Ticket):
                self._open_ids.discard(opening.id)
            if future.done():  # cancelled, or it had waited too long
                if isinstance(outcome, Ticket):
                    self._release(outcome)
            elif isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        for settling in batch.settlings:
            self._settling.pop(settling, None)
            self._open_ids.discard(settling.id)
            future, outcome = settling.future, settling.outcome
            if future is None or future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _tick(self) -> None:
        """Give up on requests that waited too long, and write how far streams are."""
        self._ticker = self._loop.call_later(_TICK_S, self._tick)
        now_s = time.monotonic()
        for opening in list(self._opening):
            if opening.deadline_s > now_s:
                break
            del self._opening[opening]
            opening.is_abandoned = True
            if not opening.future.done():
                opening.future.set_exception(_away())
        if self._progress and now_s >= self._progress_due_s:
            self._progress_due_s = now_s + self._progress_s
            self._note_progress()

    def _note_progress(self) -> None:
        if self._writer is None:
            return
        noted, self._progress = self._progress, {}
        self._num_noting += len(noted)
        for row in noted.values():
            self._writer.submit(row)

    async def close(self) -> None:
        """Write what is pending and release the database.

        Raises: OverloadedError if settlements could not be written in time: their rows stay open,
        and the next gateway that starts settles them with the progress noted last.
        """
        self._is_closing = True
        if self._writer is None:
            return
        deadline_s = time.monotonic() + self._close_timeout_s
        while (self._settling or self._opening) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.005)
        # Of rows that are still open: whoever sweeps them takes what is noted.
        self._note_progress()
        while self._num_noting and time.monotonic() < deadline_s:
            await asyncio.sleep(0.005)
        if self._num_noting:
            log.warning("the progress of %d requests is not written", self._num_noting)
        self._ticker.cancel()
        writer, self._writer = self._writer, None
        try:
            await call_aside(writer.stop, _GOODBYE_S)
            await call_aside(self.keeper.stop, _GOODBYE_S)
        except (SQLAlchemyError, TimeoutError) as error:
            log.warning("could not say goodbye to the ledger's database: %r", error)
        if self._settling or self._opening:
            raise self._give_up()

    def _give_up(self) -> OverloadedError:
        """Tell everybody who still waits that nothing more will be written."""
        error = OverloadedError(
            f"the ledger was closed while its database did not answer: {len(self._settling)} "
            "settlements are not written",
            hint="the next gateway that starts settles their rows",
        )
        for waiting in (*self._settling, *self._opening):
            if waiting.future is not None and not waiting.future.done():
                waiting.future.set_exception(error)
        return error


def _away() -> OverloadedError:
    return OverloadedError(
        "the ledger's database does not answer", retry_after_s=1.0, hint="retry in a second"
    )
