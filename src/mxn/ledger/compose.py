"""From what a gateway says to what is written: which amounts a request reserves, and what it costs.

Pure: rules and times are arguments. A request that ended before anything left the gateway, other
than by completing, costs nothing.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from mxn.errors import ConfigError, QuotaError
from mxn.ledger.apply import WINDOW_US
from mxn.ledger.bounds import bounded, check_usage
from mxn.ledger.operations import Opening, Settling
from mxn.ledger.periods import Periods
from mxn.ledger.rules import Budget, Limit, Rules, Tariff
from mxn.ledger.types import CloseReason, OpenUsage, Principal, Receipt, Settlement, Ticket

log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
FREE = Tariff((0,) * 6, "", "{}")


def is_billed(reason: str, output_tokens: int) -> bool:
    """Say whether a request is paid for: it completed, or part of its answer left the gateway."""
    return reason == "complete" or output_tokens > 0


def compose_opening(
    rules: Rules, periods: Periods, usage: OpenUsage, *, gateway_id: str, now_us: int,
    deadline_s: float, future: Any,
) -> Opening:  # fmt: skip
    """Return the row of a request with all it must fit in.

    Raises: ConfigError, QuotaError, UserError for counts that cannot be.
    """
    check_usage(usage)
    if rules.has_currencies:
        for chip in usage.chips or ("", *rules.chips):
            rules.tariff(usage.model, chip, now_us, usage.base)  # refused before it has run
    subjects = rules.subjects(usage)
    limits: tuple[tuple[Limit, int], ...] = ()
    budgets: tuple[tuple[Budget, int, int], ...] = ()
    reserved: tuple[tuple[str, int, int], ...] = ()
    if subjects.limits:
        amounts = {"requests": 1, "input_tokens": usage.input_tokens, "output_tokens": 0}
        limits = tuple((limit, amounts[limit.kind]) for limit in subjects.limits)
    if subjects.budgets:
        budgets = _reserve(rules, periods, usage, subjects.budgets, now_us)
        reserved = tuple((budget.id, start, amount) for budget, start, amount in budgets)
    who, chips = usage.principal, usage.chips
    row = (
        usage.usage_id, usage.request_id, gateway_id, who.org_id, who.project_id, who.user_id,
        who.key_id, usage.endpoint, usage.model, chips[0] if len(chips) == 1 else "", now_us,
        _encode(reserved).decode() if reserved else None, usage.batch_id, usage.is_stream, "open",
        usage.base,
    )  # fmt: skip
    ticket = Ticket(usage=usage, opened_us=now_us, reserved=reserved)
    window = now_us - now_us % WINDOW_US
    return Opening(row, ticket, limits, budgets, window, future, deadline_s)


def _reserve(
    rules: Rules, periods: Periods, usage: OpenUsage, known: tuple[Budget, ...], now_us: int
) -> tuple[tuple[Budget, int, int], ...]:
    """Return (budget, period start, amount) of each budget that may pay for this request.

    Money is reserved in each currency it could be paid in: which one shows when it has run.
    """
    tokens = usage.input_tokens + usage.max_output_tokens
    worst: dict[str, int] = {}
    if any(budget.unit == "micro" for budget in known):
        worst = _worst(rules, usage, now_us)
        _require_all(known, worst)
    found = []
    for budget in known:
        if budget.unit == "tokens":
            amount = tokens
        elif worst and budget.currency not in worst:
            continue
        else:
            amount = worst.get(budget.currency, 0)
        found.append((budget, periods.start(budget.period, now_us), amount))
    return tuple(found)


def _worst(rules: Rules, usage: OpenUsage, now_us: int) -> dict[str, int]:
    """Return the most that a request may cost, by currency; nothing where it is free."""
    worst: dict[str, int] = {}
    for chip in usage.chips or ("", *rules.chips):
        tariff = rules.tariff(usage.model, chip, now_us, usage.base)
        if tariff.currency:
            micro = tariff.worst(usage.input_tokens, usage.max_output_tokens)
            worst[tariff.currency] = max(micro, worst.get(tariff.currency, 0))
    return worst


def _require_all(known: tuple[Budget, ...], worst: dict[str, int]) -> None:
    """Refuse a request that may be paid in a currency in which a subject with budgets has none.

    Raises: QuotaError.
    """
    for budget in known:
        if budget.unit == "tokens" or (budget.currency in worst and len(worst) == 1):
            continue
        having = {one.currency for one in known if one.subject == budget.subject}
        for currency in worst:
            if currency not in having:
                raise QuotaError(
                    f"budget {budget.id} of {budget.subject} is in {budget.currency}, and this "
                    f"model may be paid in {currency}",
                    hint=f"have a budget in {currency} set for {budget.subject}",
                )


def compose_settling(
    rules: Rules, ticket: Ticket, used: Settlement, *, now_us: int, future: Any = None
) -> Settling:
    """Return how a row is closed: its cost by the price at opening, and what its budgets pay."""
    usage = ticket.usage
    used = bounded(usage.usage_id, used)
    tariff, micro, tokens = FREE, 0, 0
    if is_billed(used.reason, used.output_tokens):
        tariff = _tariff(rules, ticket, used.chip)
        micro, tokens = tariff.cost(used), used.input_tokens + used.output_tokens
    row = (
        now_us, used.reason, used.status, used.chip, used.replica, used.input_tokens,
        used.cached_tokens, used.output_tokens, used.reasoning_tokens, used.num_replicas,
        used.basis, used.device_us, micro, tariff.currency, tariff.text, usage.usage_id,
    )  # fmt: skip
    window = now_us - now_us % WINDOW_US
    return Settling(
        row=row,
        id=usage.usage_id,
        receipt=Receipt(usage_id=usage.usage_id, cost_micro=micro, currency=tariff.currency),
        settled_us=now_us,
        reason=used.reason,
        periods=tuple(
            ((budget, start), amount, spent_of(rules.units, budget, tokens, micro, tariff.currency))
            for budget, start, amount in ticket.reserved
        ),
        windows=tuple(
            ((limit.id, window), used.output_tokens)
            for limit in rules.subjects(usage).limits
            if limit.kind == "output_tokens" and used.output_tokens
        ),
        future=future,
    )


def _tariff(rules: Rules, ticket: Ticket, chip: str) -> Tariff:
    """Return what prices a request that has run: it must be settled, whatever became of them."""
    usage = ticket.usage
    try:
        return rules.tariff(usage.model, chip, ticket.opened_us, usage.base)
    except ConfigError as error:
        log.error("usage row %s is priced in part: %s", usage.usage_id, error)
        return rules.tariff(
            usage.model, chip, ticket.opened_us, usage.base, is_one_currency=True
        )  # fmt: skip


def spent_of(
    units: dict[str, tuple[str, str]], budget: str, tokens: int, micro: int, currency: str
) -> int:
    """Return what a request takes from a budget, in its unit."""
    unit, of = units.get(budget, ("", ""))
    if unit == "tokens":
        return tokens
    return micro if of == currency else 0


def compose_orphan(
    rules: Rules, row: Any, *, now_us: int, reason: CloseReason = "gateway_lost"
) -> Settling:
    """Return how a row that nobody has is closed: with the progress that was noted last."""
    who = Principal(
        key_id=row.key_id, org_id=row.org_id, project_id=row.project_id, user_id=row.user_id
    )
    usage = OpenUsage(
        usage_id=row.id, request_id=row.request_id, principal=who, endpoint=row.endpoint,
        model=row.model, base=row.base, batch_id=row.batch_id, is_stream=row.is_stream,
    )  # fmt: skip
    reserved = tuple((name, start, amount) for name, start, amount in decode_reserved(row.reserved))
    used = Settlement(
        reason=reason, chip=row.chip, replica=row.replica, status=500,
        input_tokens=row.input_tokens, output_tokens=row.output_tokens,
    )  # fmt: skip
    ticket = Ticket(usage=usage, opened_us=row.opened_us, reserved=reserved)
    return compose_settling(rules, ticket, used, now_us=now_us)


def decode_reserved(text: str | None) -> list[tuple[str, int, int]]:
    """Return (budget, period start, amount) of the budgets a row is charged to."""
    return msgspec.json.decode(text or "[]", type=list[tuple[str, int, int]])
