"""What a gateway and the ledger say to each other: who asks, what is opened, how it ended.

Money is an integer of a millionth of a currency unit (micro), prices are micro per million tokens,
times are integer microseconds of Unix time. Knows no SQL and no HTTP.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

TokenKind = Literal["input", "cached", "output", "reasoning"]
Scope = Literal["inference", "batch", "replica", "admin"]

CloseReason = Literal[
    "complete",  # the whole answer was made, and settled before its last event left
    "client_gone",  # the client closed the connection; it pays for what left the gateway
    "replica_lost",  # no replica could finish it
    "timeout",
    "error",  # refused by the replica, or our fault: nothing to pay unless tokens had left
    "gateway_lost",  # the gateway died; settled by another one with the last noted progress
]

# Where token counts come from: the engine's own count, our count of a foreign server's answer with
# the model's tokenizer, or one token for each event of such a server.
CountBasis = Literal["engine", "server", "counted", "events"]


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, resolved from an API key. `models` None: every model."""

    key_id: str
    org_id: str
    project_id: str
    user_id: str | None = None
    scopes: frozenset[Scope] = frozenset({"inference", "batch"})
    models: frozenset[str] | None = None
    weight: float = 1.0  # share among tenants when replicas are full
    priority: int = 0  # smaller runs first

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class OpenUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request before it is sent to a replica.

    `usage_id` is unique (the id of the answer, such as `chatcmpl-…`); `chips` are those that could
    serve it, since the dearest price among them is what is reserved.
    """

    usage_id: str
    request_id: str  # x-request-id, for people
    principal: Principal
    endpoint: str
    model: str
    base: str = ""  # the model that this one adapts: its prices count where `model` has none
    chips: tuple[str, ...] = ()
    input_tokens: int = 0
    max_output_tokens: int = 0  # of all choices together
    is_stream: bool = False
    batch_id: str | None = None


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """An open usage row. `reserved` is (budget id, period start, amount) for each budget."""

    usage: OpenUsage
    opened_us: int
    reserved: tuple[tuple[str, int, int], ...] = ()
    limits: tuple[LimitState, ...] = ()


class LimitState(msgspec.Struct, frozen=True, kw_only=True):
    """A rate limit after this request was counted, for the `x-ratelimit-*` headers."""

    kind: Literal["requests", "input_tokens", "output_tokens"]
    limit: int
    remaining: int
    reset_s: float


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended and what it used. `output_tokens` includes `reasoning_tokens`, and
    `input_tokens` includes `cached_tokens`; output counts the tokens that left the gateway."""

    reason: CloseReason
    chip: str = ""
    replica: str = ""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    device_us: int = 0
    basis: CountBasis = "engine"
    num_replicas: int = 1  # how many took part; more than one after a failover
    status: int = 200


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a settled row says. `is_new` is False when it had been settled before."""

    usage_id: str
    cost_micro: int
    currency: str
    is_new: bool = True


class Ledger(Protocol):
    """The part of the ledger that requests go through. Every method is safe from one event loop."""

    async def authenticate(self, key: str) -> Principal:
        """Raises: AuthError for an unknown, expired or revoked key, at most 1 s after it was."""
        ...

    async def open(self, usage: OpenUsage) -> Ticket:
        """Write the row, count it against rate limits and reserve its budgets, all or nothing.

        The row is durable when this returns.
        Raises: RateLimitError, QuotaError (with budget, limit and what is left).
        """
        ...

    def progress(
        self,
        ticket: Ticket,
        input_tokens: int,
        output_tokens: int,
        *,
        chip: str = "",
        replica: str = "",
    ) -> None:
        """Note how far a stream is; written from time to time, and at once only in memory.

        `chip` is whose price counts if this gateway dies; needed where several could serve it.
        """
        ...

    async def settle(self, ticket: Ticket, settlement: Settlement) -> Receipt:
        """Close the row exactly once: cost by the price at opening, reservations turned into
        spending and the rest released. Durable when this returns; a second call changes nothing.
        """
        ...

    async def close(self) -> None:
        """Write everything that is pending and release the database."""
        ...
