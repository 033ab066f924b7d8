"""Payment that waits until what is paid for can be read. Knows no storage.

While a request runs, its context has a `HeldLedger`: the row opens as always, but its settlement is
only noted. `release` settles it once the answer is stored. If the server dies between, the row is
open, nothing of it has left, and whoever sweeps it takes no money.
"""

from __future__ import annotations

import msgspec

from mxn.ledger.types import Ledger, OpenUsage, Principal, Receipt, Settlement, Ticket
from mxn.serve.context import RequestContext
from mxn.serve.metering import settle_row

_NOTHING = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}


class HeldLedger:
    """A `Ledger` in front of another for one request, put into its context by `hold`."""

    def __init__(self, context: RequestContext, ledger: Ledger) -> None:
        self._context = context
        self._ledger = ledger
        self._traffic = context.traffic
        self._held: tuple[Ticket, Settlement] | None = None

    async def authenticate(self, key: str) -> Principal:
        return await self._ledger.authenticate(key)

    async def open(self, usage: OpenUsage) -> Ticket:
        return await self._ledger.open(usage)

    def progress(
        self, ticket: Ticket, input_tokens: int, output_tokens: int, *, chip: str = "",
        replica: str = "",
    ) -> None:  # fmt: skip
        """Nothing leaves before the answer is stored, so there is no progress."""

    async def settle(self, ticket: Ticket, settlement: Settlement) -> Receipt:
        """Note it. Counters and money follow with the settlement that is real."""
        if self._held is None:
            self._held = (ticket, settlement)
            self._context.traffic = None
        return Receipt(usage_id=ticket.usage.usage_id, cost_micro=0, currency="")

    async def close(self) -> None:
        """The ledger behind is closed by who opened it."""

    async def release(self, *, is_readable: bool) -> None:
        """Settle what was noted; what cannot be read costs nothing. A second call does nothing."""
        held, self._held = self._held, None
        if held is None:
            return
        ticket, used = held
        if not is_readable:
            used = msgspec.structs.replace(used, reason="error", status=500, **_NOTHING)
        self._context.traffic = self._traffic
        await settle_row(self._context, self._ledger, ticket, used)


def hold(context: RequestContext) -> HeldLedger | None:
    """Make the payment of a request wait; None where it is accounted nowhere."""
    if context.ledger is None or context.principal is None:
        return None
    held = HeldLedger(context, context.ledger)
    context.ledger = held
    return held
