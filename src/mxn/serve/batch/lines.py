"""Runs the lines of a batch that this gateway holds, each until it has a result that is stored.

A line's attempt is noted before it begins and its result as soon as it is there. An earlier attempt
that was paid for is run again without being billed again, and one whose row in the ledger is still
open is waited for, so that no line is paid twice. A database that is away is waited for as well.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from mxn.serve.batch.lease import Lease
from mxn.serve.batch.line_store import Held, Line
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import LineResponse, ResultLine
from mxn.serve.context import RequestContext

log = logging.getLogger("mxn.serve.batch")
T = TypeVar("T")

PAGE = 256
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_LOOK_S = 0.25  # between two looks at a row that is open, and at a database that is away
_PAID_PATIENCE_S = 300.0  # for a line that was paid, when its batch shall stop
_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)

Answer = tuple[int, dict[str, str], bytes]
Call = Callable[[str, bytes, RequestContext], Awaitable[Answer]]
"""Runs one request in this process: (path, body, context) → (status, headers, body)."""


class LineRunner:
    def __init__(
        self, batches: BatchStore, call: Call, held: Held, lease: Lease, *, concurrency: int
    ) -> None:
        self._batches = batches
        self._call = call
        self._held = held
        self._lease = lease
        self._room = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Run what has no result yet, until all have one or the batch must stop.

        Raises: LeaseLostError; and the first error of a line that has none, after the others are
        done. When the batch is cancelled or expires, lines that were paid for are still answered.
        """
        try:
            await self._run_page_by_page(only_begun=False)
            if self._lease.must_stop:
                await self._run_page_by_page(only_begun=True)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._drain()
        self._lease.require()
        if self._failure is not None:
            raise self._failure

    async def _run_page_by_page(self, *, only_begun: bool) -> None:
        after = 0
        while not self._must_stop(only_begun):
            lines = await self._patiently(self._batches.next_lines, self._held, after, PAGE)
            for line in lines:
                after = line.line
                if only_begun and line.usage_id is None:
                    continue
                await self._room.acquire()
                if self._must_stop(only_begun):
                    self._room.release()
                    break
                self._start(line)
            if not lines:
                break
        await self._drain()

    def _must_stop(self, only_begun: bool) -> bool:
        return self._lease.is_lost if only_begun else self._lease.must_stop

    def _start(self, line: Line) -> None:
        task = asyncio.create_task(self._guard(line), name=f"mxn-line-{line.line}")
        for tasks in (self._tasks, self._lease.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _drain(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _guard(self, line: Line) -> None:
        try:
            await self._run_line(line)
        except Exception as error:
            log.exception("line %d of batch %s has no result", line.line, self._held.id)
            self._failure = self._failure or error
        finally:
            self._room.release()

    async def _patiently(self, work: Callable[..., T], *args: Any) -> T:
        """Return what `work` returns in a thread, waiting for a database that is away.

        Raises: LeaseLostError when the batch is lost meanwhile.
        """
        pause_s = _LOOK_S
        while True:
            self._lease.require()
            try:
                return await asyncio.to_thread(work, *args)
            except _AWAY as error:
                log.warning("the database of batch %s is away: %s", self._held.id, error)
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, 10.0)

    async def _run_line(self, line: Line) -> None:
        is_paid = await self._was_paid(line)
        ended = await self._answer(line, line.usage_id if is_paid else None)
        if ended is None:
            return
        usage_id, (status, headers, body) = ended
        result = ResultLine(
            id=usage_id,
            custom_id=line.custom_id,
            response=LineResponse(
                status_code=status,
                request_id=headers.get("x-request-id", usage_id),
                body=_on_one_line(body),
            ),
            error=None,
        )
        text = msgspec.json.encode(result).decode()
        state = "completed" if status == 200 else "failed"
        if not await self._patiently(self._batches.end_line, self._held, line.line, state, text):
            self._lease.lose()

    async def _was_paid(self, line: Line) -> bool:
        """Return whether an earlier attempt was paid for, once its row is closed: by the gateway
        that ran it, or by the ledger's sweep when that one is gone. A batch that must stop waits
        for it a few minutes only."""
        if line.usage_id is None:
            return False
        stops_s = 0.0
        while True:
            state = await self._patiently(self._batches.state_of, line.usage_id)
            if state != "open":
                return state == "paid"
            if self._lease.must_stop:
                stops_s = stops_s or time.monotonic() + _PAID_PATIENCE_S
                if time.monotonic() > stops_s:
                    log.error("row %s of batch %s stays open", line.usage_id, self._held.id)
                    return False
            await asyncio.sleep(_LOOK_S)

    async def _answer(self, line: Line, paid_id: str | None) -> tuple[str, Answer] | None:
        """Run a line until it has a final answer; what passes by itself is waited for.

        Each attempt has a row of its own in the ledger. Returns None when the batch must stop while
        the line waits for its turn, or is another gateway's.
        """
        pause_s = _FIRST_PAUSE_S
        patient_until_s = time.monotonic() + _PAID_PATIENCE_S
        while paid_id is not None or not self._lease.must_stop:
            usage_id = paid_id or f"batch_req_{uuid.uuid4().hex}"
            if not await self._patiently(self._batches.start_line, self._held, line.line, usage_id):
                self._lease.lose()
                return None
            context = self._context(usage_id, is_billed=paid_id is None)
            answer = await self._call(self._held.endpoint, line.body.encode(), context)
            if not _passes_by_itself(answer):
                return usage_id, answer
            if context.reason == "complete":  # paid, and then its answer was lost
                paid_id = usage_id
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lease.stopping.wait(), _pause(answer, pause_s))
            if self._lease.must_stop:
                if paid_id is None or time.monotonic() > patient_until_s:
                    return None
                await asyncio.sleep(_FIRST_PAUSE_S)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return None

    def _context(self, usage_id: str, *, is_billed: bool) -> RequestContext:
        held = self._held
        return RequestContext(
            request_id=usage_id,
            principal=held.principal,
            endpoint=held.endpoint,
            is_batch=True,
            batch_id=held.id,
            usage_id=usage_id,
            is_billed=is_billed,
        )


def _on_one_line(body: bytes) -> msgspec.Raw:
    """Return a body as JSON for one line of a file; what is no JSON becomes a string."""
    try:
        msgspec.json.decode(body)
        return msgspec.Raw(msgspec.json.format(body, indent=-1) if b"\n" in body else body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))


def _passes_by_itself(answer: Answer) -> bool:
    """Limits, overload and a replica that is away pass; a spent budget does not."""
    status, headers, _ = answer
    return status in (408, 429, 503) and headers.get("x-should-retry") != "false"


def _pause(answer: Answer, pause_s: float) -> float:
    """Wait as long as the server asks, else a growing time; with jitter, so lines spread out."""
    try:
        asked_s = float(answer[1].get("retry-after", ""))
    except ValueError:
        asked_s = 0.0
    return max(pause_s, min(asked_s, _LONGEST_PAUSE_S)) * random.uniform(0.8, 1.2)
