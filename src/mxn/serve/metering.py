"""Opens and settles the usage row of a request, whoever does the work. Start at `Meter.open`.

One row for each HTTP request: durable before anything is sent to a replica, settled before the last
event leaves. A request that ends early is settled with what had left; that runs in a task of its
own, so that the end of the request cannot cut it off. Without a ledger nothing happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from mxn.errors import DeadlineError, EngineDiedError
from mxn.ledger.types import CloseReason, CountBasis, Ledger, OpenUsage, Settlement, Ticket
from mxn.serve.context import RequestContext, current
from mxn.serve.openai.errors import ClientGone, from_exception

log = logging.getLogger("mxn.serve")

_settling: set[asyncio.Task[Any]] = set()


async def settled() -> None:
    """Return when nothing is being settled in the background; for the end of a server."""
    while _settling:
        await asyncio.wait(set(_settling))


class Meter:
    """The row of one request. `ticket` None: it is not accounted."""

    __slots__ = ("_context", "_ledger", "_ticket")

    def __init__(
        self, context: RequestContext, ledger: Ledger | None = None, ticket: Ticket | None = None
    ) -> None:
        self._context = context
        self._ledger = ledger
        self._ticket = ticket

    @classmethod
    async def open(
        cls,
        usage_id: str,
        *,
        model: str,
        chips: Sequence[str] = (),
        input_tokens: int = 0,
        max_output_tokens: int = 0,
        is_stream: bool = False,
    ) -> Meter:
        """Open the row of the current request. Raises: RateLimitError, QuotaError."""
        context = current()
        ledger, principal = context.ledger, context.principal
        if ledger is None or principal is None or not context.is_billed:
            return cls(context)
        usage = OpenUsage(
            usage_id=context.usage_id or usage_id,
            request_id=context.request_id,
            principal=principal,
            endpoint=context.endpoint,
            model=model,
            chips=tuple(chips),
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            is_stream=is_stream,
            batch_id=context.batch_id,
        )
        ticket = await ledger.open(usage)
        context.limits = ticket.limits
        return cls(context, ledger, ticket)

    @property
    def is_open(self) -> bool:
        return self._ticket is not None

    def progress(self, input_tokens: int, output_tokens: int) -> None:
        """Note what has left. What a batch makes leaves only when its line is stored."""
        if self._ticket is not None and self._ledger is not None and not self._context.is_batch:
            self._ledger.progress(self._ticket, input_tokens, output_tokens)

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
        context = self._context
        context.input_tokens, context.output_tokens = input_tokens, output_tokens
        ticket, self._ticket = self._ticket, None
        if ticket is None or self._ledger is None:
            return
        hops = context.hops
        settlement = Settlement(
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
        task = asyncio.ensure_future(self._ledger.settle(ticket, settlement))
        _settling.add(task)
        task.add_done_callback(_done)
        receipt = await asyncio.shield(task)
        context.cost_micro = receipt.cost_micro


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
