"""What is known of the HTTP request that the current task works for, from arrival to its end.

The gateway middleware makes one for each request; whoever runs for that request finds it with
`current()`, also in tasks and generators it started. Knows no routes and no models.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

import msgspec

from mxn.ledger.types import CloseReason, Ledger, LimitState, Principal

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from mxn.serve.traffic import Traffic


class Hop(msgspec.Struct, kw_only=True):
    """One replica that took part in a request."""

    replica: str
    chip: str
    device: str = ""
    reason: str = ""  # why the router chose it, such as "prefix 512 of 600 tokens"
    resumed_tokens: int = 0  # tokens that were made before this replica took over
    is_takeover: bool = False  # an earlier replica of this request was lost
    begun_s: float = msgspec.field(default_factory=time.perf_counter)


class RequestContext(msgspec.Struct, kw_only=True):
    """Filled on the way; read for response headers, the ledger, traces and logs."""

    request_id: str = "?"
    principal: Principal | None = None
    ledger: Ledger | None = None  # where this request is accounted; None: nowhere
    endpoint: str = ""
    model: str = ""
    arrived_s: float = msgspec.field(default_factory=time.perf_counter)
    upstream_s: float = 0.0  # time spent waiting for replicas, which is not the gateway's own
    queue_s: float = 0.0  # the part of it before a replica had room
    ledger_open_begun_s: float = 0.0  # 0: never; on the clock of `time.perf_counter`
    ledger_open_s: float = 0.0
    ledger_settle_begun_s: float = 0.0
    ledger_settle_s: float = 0.0
    deadline_s: float | None = None  # on the clock of `time.monotonic`
    hops: list[Hop] = msgspec.field(default_factory=list)
    limits: tuple[LimitState, ...] = ()
    headers: dict[str, str] = msgspec.field(default_factory=dict)  # added to the answer, lower case
    is_batch: bool = False  # a line of a batch: low priority, progress is not noted
    batch_id: str | None = None
    usage_id: str | None = None  # of the row in the ledger; None: the id of the answer
    # What was settled, for logs, metrics and traces; filled without a ledger too.
    reason: CloseReason | None = None  # None: nothing was dispatched
    refusal: str = ""  # which limit refused it: budget, requests, input_tokens, output_tokens
    is_stream: bool = False
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    device_us: int = 0
    cost_micro: int = 0
    currency: str = ""
    traceparent: bytes = b""  # sent on to replicas; empty: nobody traces
    trace: Span | None = None
    traffic: Traffic | None = None  # where tokens, money and refusals are counted
    is_billed: bool = True  # False: this work was paid for by an earlier attempt


_current: ContextVar[RequestContext | None] = ContextVar("mxn_request", default=None)


def current() -> RequestContext:
    """Return the context of this request; outside of one a fresh context that nobody reads."""
    return _current.get() or RequestContext()


def enter(context: RequestContext) -> None:
    """Make `context` the current one for this task and what it starts."""
    _current.set(context)
