"""Opens and settles the usage row of a request, whoever does the work. Start at `Meter.open`;
pass-through of foreign servers uses `open_row` and `settle_row`.

One row for each HTTP request: durable before anything is sent to a replica, settled before the last
event leaves. A request that ends early is settled with what had left; that runs in a task of its
own, so that the end of the request cannot cut it off. Without a ledger nothing happens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from mxn.errors import DeadlineError, EngineDiedError, QuotaError, RateLimitError
from mxn.ledger.types import (
    CloseReason,
    CountBasis,
    Ledger,
    OpenUsage,
    Receipt,
    Settlement,
    Ticket,
)
from mxn.serve.context import RequestContext, current
from mxn.serve.openai.errors import ClientGone, from_exception

log = logging.getLogger("mxn.serve")

_PROGRESS_S = 0.25
_SETTLED_S = 10.0  # at the end of a server, for a database that is away

_settling: set[asyncio.Task[Any]] = set()


async def settled(limit_s: float = _SETTLED_S) -> int:
    """Wait until nothing is being settled in the background; for the end of a server.

    Returns how many rows are still open after `limit_s`: the database is away, and they are settled
    by another gateway or the next start.
    """
    until_s = time.monotonic() + limit_s
    while _settling and (left_s := until_s - time.monotonic()) > 0:
        await asyncio.wait(set(_settling), timeout=left_s)
    if _settling:
        log.error(
            "%d usage rows are not settled after %g s and stay open; the next sweep settles them",
            len(_settling), limit_s,
        )  # fmt: skip
    return len(_settling)


async def open_row(context: RequestContext, ledger: Ledger, usage: OpenUsage) -> Ticket:
    """Open a row; it is durable when this returns. Notes times, limits and refusals.

    Raises: RateLimitError, QuotaError, OverloadedError when the database is away.
    """
    begun_s = context.ledger_open_begun_s = time.perf_counter()
    try:
        ticket = await ledger.open(usage)
    except QuotaError:
        context.refusal = "budget"
        raise
    except RateLimitError as error:
        context.refusal = error.kind
        raise
    finally:
        context.ledger_open_s = time.perf_counter() - begun_s
        if context.traffic is not None:
            context.traffic.ledger_s.add(("open",), context.ledger_open_s)
    context.limits = ticket.limits
    return ticket


async def settle_row(
    context: RequestContext, ledger: Ledger | None, ticket: Ticket | None, used: Settlement
) -> None:
    """Close a row, even if the caller is cancelled meanwhile; without a row only note and count."""
    context.reason = used.reason
    context.input_tokens, context.output_tokens = used.input_tokens, used.output_tokens
    context.cached_tokens, context.reasoning_tokens = used.cached_tokens, used.reasoning_tokens
    context.device_us = used.device_us
    if ticket is None or ledger is None:
        _count(context, used, None)
        return
    try:
        await _settle(context, ledger, ticket, used)
    except asyncio.CancelledError:
        # The ledger goes on with it. A second call changes nothing, and waits for what was noted.
        task = asyncio.ensure_future(_settle(context, ledger, ticket, used))
        _settling.add(task)
        task.add_done_callback(_done)
        raise


async def _settle(
    context: RequestContext, ledger: Ledger, ticket: Ticket, used: Settlement
) -> None:
    begun_s = context.ledger_settle_begun_s = time.perf_counter()
    receipt = await ledger.settle(ticket, used)
    context.ledger_settle_s = time.perf_counter() - begun_s
    context.cost_micro, context.currency = receipt.cost_micro, receipt.currency
    _count(context, used, receipt)


def _count(context: RequestContext, used: Settlement, receipt: Receipt | None) -> None:
    if context.traffic is not None:
        if receipt is not None:
            context.traffic.ledger_s.add(("settle",), context.ledger_settle_s)
        context.traffic.settled(context, used, receipt)


class Meter:
    """The row of one request. Without a ledger it only notes what happened in the context."""

    __slots__ = ("_context", "_due_s", "_ledger", "_ticket", "is_open")

    def __init__(
        self, context: RequestContext, ledger: Ledger | None = None, ticket: Ticket | None = None
    ) -> None:
        self._context = context
        self._ledger = ledger
        self._ticket = ticket
        self._due_s = time.monotonic() + _PROGRESS_S
        self.is_open = True  # until it is settled

    @classmethod
    async def open(
        cls,
        usage_id: str,
        *,
        model: str,
        base: str = "",
        chips: Sequence[str] = (),
        input_tokens: int = 0,
        max_output_tokens: int = 0,
        is_stream: bool = False,
    ) -> Meter:
        """Open the row of the current request. Raises: see `open_row`."""
        context = current()
        context.is_stream = is_stream
        ledger, principal = context.ledger, context.principal
        if ledger is None or principal is None or not context.is_billed:
            return cls(context)
        usage = OpenUsage(
            usage_id=context.usage_id or usage_id,
            request_id=context.request_id,
            principal=principal,
            endpoint=context.endpoint,
            model=model,
            base=base,
            chips=tuple(chips),
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            is_stream=is_stream,
            batch_id=context.batch_id,
        )
        return cls(context, ledger, await open_row(context, ledger, usage))

    def is_due(self) -> bool:
        """Whether progress should be noted again, which is a few times a second.

        What a batch makes leaves only when its line is stored.
        """
        if self._ticket is None or self._context.is_batch or time.monotonic() < self._due_s:
            return False
        self._due_s = time.monotonic() + _PROGRESS_S
        return True

    def progress(self, input_tokens: int, output_tokens: int) -> None:
        """Note what has left; a dead gateway's row is settled with it. Ask `is_due` before."""
        if self._ticket is None or self._ledger is None:
            return
        hop = self._context.hops[-1] if self._context.hops else None
        self._ledger.progress(
            self._ticket,
            input_tokens,
            output_tokens,
            chip=hop.chip if hop else "",
            replica=hop.replica if hop else "",
        )

    async def settle(
        self,
        reason: CloseReason,
        *,
        input_tokens: int = 0,
        cached_tokens: int = 0,
        output_tokens: int = 0,
        reasoning_tokens: int = 0,
        device_us: int = 0,
        basis: CountBasis = "engine",
        status: int = 200,
    ) -> None:
        """Close the row; the first call counts, and it is done even if the caller is cancelled."""
        if not self.is_open:
            return
        self.is_open = False
        ticket, self._ticket = self._ticket, None
        hops = self._context.hops
        used = Settlement(
            reason=reason,
            chip=hops[-1].chip if hops else "",
            replica=hops[-1].replica if hops else "",
            input_tokens=input_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens,
            device_us=device_us,
            basis=basis,
            num_replicas=len({hop.replica for hop in hops}),
            status=status,
        )
        await settle_row(self._context, self._ledger, ticket, used)


def _done(task: asyncio.Task[Any]) -> None:
    _settling.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a usage row could not be settled: %s", error)


def reason_of(exc: BaseException) -> tuple[CloseReason, int]:
    """Return why a request that ends with `exc` was closed, and the HTTP status for the row."""
    if isinstance(exc, asyncio.CancelledError | GeneratorExit | ClientGone):
        return "client_gone", 499
    if isinstance(exc, DeadlineError):
        return "timeout", 408
    if isinstance(exc, EngineDiedError):
        return "replica_lost", 503
    return "error", from_exception(exc).status if isinstance(exc, Exception) else 500
