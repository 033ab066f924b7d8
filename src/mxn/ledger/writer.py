"""Group commit: what arrives while a transaction runs is written together in the next one.

Two drivers of the same attempts: `InlineWriter` runs them on the event loop, which is fastest where
a transaction takes microseconds (SQLite without a flush); `ThreadWriter` in a thread of its own.
A batch is tried until it is written: settlements are never dropped, and openings only when nobody
waits for them any more. Knows no prices and no limits.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from mxn.errors import InternalError
from mxn.ledger.apply import apply
from mxn.ledger.operations import Batch, Opening, Settling
from mxn.ledger.sql import Store

log = logging.getLogger(__name__)

Operation = Opening | Settling | tuple[Any, ...]  # a tuple: progress of a row
Deliver = Callable[[Batch], None]
Connect = Callable[[], Store]

_BUSY_S = (0.0002, 0.001)  # waits for another process that writes to the same file
_AWAY_S = (0.02, 1.0)  # waits for a database that is away
_MAX_TAKEN = 5  # looks for the row that has an id already, before a batch is taken apart


class Writer(Protocol):
    def submit(self, operation: Operation, *, is_alone: bool = False) -> None:
        """Queue an operation. On the event loop only.

        `is_alone`: nothing else is under way that it could be written together with.
        """
        ...

    def stop(self) -> None:
        """End after the batch under way; what is queued stays unwritten."""
        ...


class Attempts:
    """Writes one batch at a time, in as many attempts as it takes."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._store: Store | None = None
        self._parts: deque[Batch] = deque()
        self._num_busy = 0
        self._num_failures = 0
        self._num_taken = 0
        self._is_retry = False

    def run(self, batch: Batch) -> float | None:
        """Try to write a batch; return None when it is done, else seconds to wait before the next
        call, which must be with the same batch."""
        if not self._parts:
            self._parts.append(batch)
        while self._parts:
            try:
                if self._store is None:
                    self._store = self._connect()
                apply(self._store, self._parts[0], is_retry=self._is_retry)
            except Exception as error:
                wait_s = self._failed(error)
                if wait_s is not None:
                    return wait_s
                continue
            if self._num_failures:
                log.warning("the ledger's database is back")
            self._num_busy = self._num_failures = self._num_taken = 0
            self._is_retry = False
            self._parts.popleft()
        return None

    def _failed(self, error: Exception) -> float | None:
        """Decide what follows an error: seconds to wait, or None to go on at once."""
        is_usable = self._roll_back()
        if is_usable and _is_busy(error):
            self._num_busy += 1
            return _pause(_BUSY_S, self._num_busy)
        if self._is_away(error):
            self.close()
            self._num_failures += 1
            if self._num_failures == 1:
                log.warning("the ledger's database is away, and is tried again: %s", error)
            self._is_retry = True  # the commit may have been the last thing that worked
            for one in self._parts[0].openings:
                one.is_tried = True
            return _pause(_AWAY_S, self._num_failures)
        if _is_taken(error) and self._num_taken < _MAX_TAKEN:
            # Finds out which row there is already. After a lost commit that was still under way
            # the look before this attempt could not see it; this time it is there.
            self._num_taken += 1
            self._is_retry = True
            return None
        self._isolate(error)
        return None

    def _is_away(self, error: Exception) -> bool:
        # What fails while connecting is not the fault of the batch.
        return self._store is None or self._store.is_away(error)

    def _isolate(self, error: Exception) -> None:
        """Find the one operation that the database refuses, so that others go on without it."""
        batch = self._parts.popleft()
        self._num_taken = 0
        singles = [
            *(Batch(settlings=[one]) for one in batch.settlings),
            *(Batch(progress=[one]) for one in batch.progress),
            *(Batch(openings=[one]) for one in batch.openings),
        ]
        if len(singles) > 1:
            self._parts.extendleft(reversed(singles))
            return
        self._is_retry = False
        for row in batch.progress:
            log.error("the ledger cannot write progress %r: %s", row, error)
        for one in (*batch.openings, *batch.settlings):
            log.error("the ledger cannot write row %s", one.id, exc_info=error)
            one.outcome = InternalError(f"the ledger cannot write {one.id}: {error}")

    def _roll_back(self) -> bool:
        """Return whether the connection can be used again."""
        if self._store is None:
            return False
        try:
            self._store.rollback()
        except Exception as error:
            log.debug("rollback failed, as it does on a lost connection: %s", error)
            return False
        return True

    def close(self) -> None:
        if self._store is not None:
            try:
                self._store.close()
            except Exception as error:
                log.debug("closing a lost connection failed: %s", error)
            self._store = None


class InlineWriter:
    """Writes on the event loop. `connect` must make a store that never waits for a lock."""

    def __init__(self, connect: Connect, deliver: Deliver, loop: asyncio.AbstractEventLoop) -> None:
        self._attempts = Attempts(connect)
        self._deliver = deliver
        self._loop = loop
        self._next = Batch()
        self._under_way: Batch | None = None
        self._is_scheduled = False
        self._is_stopped = False

    def submit(self, operation: Operation, *, is_alone: bool = False) -> None:
        _add(self._next, operation)
        if not self._is_scheduled:
            self._is_scheduled = True
            if is_alone:
                self._run()
            else:
                self._loop.call_soon(self._run)

    def _run(self) -> None:
        if self._is_stopped:
            return
        batch = self._under_way
        if batch is None:
            batch, self._next = self._next, Batch()
        wait_s = self._attempts.run(batch)
        if wait_s is not None:
            self._under_way = batch
            self._loop.call_later(wait_s, self._run)
            return
        self._under_way = None
        self._is_scheduled = False
        self._deliver(batch)
        if self._next and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        self._attempts.close()


class ThreadWriter:
    """Writes in a thread; results come back to the event loop once for each transaction."""

    def __init__(self, connect: Connect, deliver: Deliver, loop: asyncio.AbstractEventLoop) -> None:
        self._attempts = Attempts(connect)
        self._deliver = deliver
        self._loop = loop
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mxn-ledger", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation, *, is_alone: bool = False) -> None:
        self._queue.put(operation)

    def _work(self) -> None:
        while not self._stopped.is_set():
            batch = self._take()
            wait_s = self._attempts.run(batch) if batch else None
            while wait_s is not None and not self._stopped.wait(wait_s):
                wait_s = self._attempts.run(batch)
            if batch and wait_s is None:
                self._hand_over(batch)
        self._attempts.close()

    def _hand_over(self, batch: Batch) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, batch)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            log.warning(
                "the database answered after the ledger was closed: what it took is written"
            )

    def _take(self) -> Batch:
        """Wait for an operation, and return it with all that arrived meanwhile."""
        batch = Batch()
        operation = self._queue.get()
        for _ in range(self._queue.qsize()):
            if operation is not None:
                _add(batch, operation)
            operation = self._queue.get()
        if operation is not None:
            _add(batch, operation)
        return batch

    def stop(self) -> None:
        self._stopped.set()
        self._queue.put(None)
        self._thread.join(timeout=15)


def _add(batch: Batch, operation: Operation) -> None:
    if isinstance(operation, Opening):
        batch.openings.append(operation)
    elif isinstance(operation, Settling):
        batch.settlings.append(operation)
    else:
        batch.progress.append(operation)


def _pause(bounds_s: tuple[float, float], times: int) -> float:
    """Return how long to wait: longer each time, and never in step with other processes."""
    shortest_s, longest_s = bounds_s
    return min(longest_s, shortest_s * 2 ** min(times, 20)) * random.uniform(0.5, 1.0)


def _is_busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) or 0
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_taken(error: Exception) -> bool:
    """Say whether a row with this key exists already."""
    is_postgres = getattr(error, "sqlstate", None) == "23505"
    return is_postgres or isinstance(error, sqlite3.IntegrityError)
