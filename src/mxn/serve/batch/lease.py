"""A batch while this gateway holds it: renewed every second, and stopped at once when it is lost.

The lease counts as lost when another gateway has it, and also when it could not be renewed for its
length: by then another one may begin, and a line that runs twice is paid twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mxn.serve.batch.line_store import Held
from mxn.serve.batch.store import BatchStore, now_us

log = logging.getLogger("mxn.serve.batch")

_RENEW_S = 1.0


class LeaseLostError(Exception):
    """The batch is another gateway's, or may be."""


@dataclass(slots=True)
class Lease:
    expires_us: int  # of the batch: no line begins later
    is_cancelling: bool = False
    is_lost: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # wakes lines that wait
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)  # ended when it is lost

    @property
    def must_stop(self) -> bool:
        return self.is_cancelling or self.is_lost or now_us() > self.expires_us

    def note(self, status: str | None) -> None:
        """Take in what a renewal said; None: the batch is another gateway's."""
        self.is_cancelling = self.is_cancelling or status == "cancelling"
        if status is None:
            self.lose()
        elif self.must_stop:
            self.stopping.set()

    def lose(self) -> None:
        self.is_lost = True
        self.stopping.set()
        for task in self.tasks:
            task.cancel()

    def require(self) -> None:
        """Raises: LeaseLostError."""
        if self.is_lost:
            raise LeaseLostError


@asynccontextmanager
async def keeping(batches: BatchStore, held: Held, lease_s: float) -> AsyncIterator[Lease]:
    """Hold a batch to the end of the block. Raises: LeaseLostError if it is lost already."""
    lease = Lease(expires_us=held.expires_us)
    began_s = time.monotonic()
    lease.note(await asyncio.to_thread(batches.renew, held, lease_s))
    lease.require()
    task = asyncio.create_task(_renew(batches, held, lease, lease_s, began_s + lease_s))
    try:
        yield lease
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _renew(
    batches: BatchStore, held: Held, lease: Lease, lease_s: float, valid_until_s: float
) -> None:
    while not lease.is_lost:
        left_s = valid_until_s - time.monotonic()
        await asyncio.sleep(max(0.0, min(_RENEW_S, lease_s / 3, left_s)))
        began_s = time.monotonic()
        if began_s >= valid_until_s:
            log.warning("the lease of batch %s was lost: it could not be renewed in time", held.id)
            lease.lose()
            return
        renewal = asyncio.to_thread(batches.renew, held, lease_s)
        try:
            status = await asyncio.wait_for(renewal, valid_until_s - began_s)
        except Exception as error:  # the database is away; it is tried again while there is time
            log.warning("cannot renew the lease of batch %s: %r", held.id, error)
            continue
        valid_until_s = began_s + lease_s
        if status is None:
            log.warning("batch %s is another gateway's now", held.id)
        lease.note(status)
