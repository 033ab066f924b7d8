"""One transaction of the ledger: which requests fit, and what closing others moves.

Exact, since amounts are read under lock: of requests that arrive together, each is let in that fits
after those before it. Knows statements only as a `Store`.
"""

from __future__ import annotations

from collections import defaultdict

from mxn.errors import InternalError, MxnError, QuotaError, RateLimitError
from mxn.ledger.money import format_money
from mxn.ledger.operations import Batch, Opening, PeriodKey, Settling
from mxn.ledger.rules import Budget, Limit
from mxn.ledger.sql import Store, View
from mxn.ledger.types import LimitState, Receipt, Ticket

WINDOW_US = 60_000_000
_RESERVED_S = 1.0  # after which requests under way may have given room back


class _Moves:
    """Amounts as this transaction sees them, and by how much it changes each."""

    def __init__(self, view: View) -> None:
        self.reserved_spent = {key: list(value) for key, value in view.periods.items()}
        self.used = view.windows
        self.moves: dict[PeriodKey, list[int]] = defaultdict(lambda: [0, 0])
        self.adds: dict[PeriodKey, int] = defaultdict(int)

    def move(self, key: PeriodKey, reserved: int, spent: int) -> None:
        moved = self.moves[key]
        moved[0] += reserved
        moved[1] += spent
        known = self.reserved_spent.get(key)
        if known is not None:
            known[0] += reserved
            known[1] += spent

    def add(self, key: PeriodKey, used: int) -> None:
        self.adds[key] += used
        if key in self.used:
            self.used[key] += used


def apply(store: Store, batch: Batch, *, is_retry: bool) -> None:
    """Write a batch in one transaction and note the outcome of each operation.

    With `is_retry`, an earlier attempt may have been committed without our knowledge: rows that it
    wrote are recognized and nothing is counted again. Raises: errors of the driver; the caller
    rolls back, and no outcome counts.
    """
    firsts, seconds = _distinct(batch.settlings)
    ids = [one.id for one in batch.openings] if is_retry else []
    periods, windows = _keys(batch)
    decides = bool(batch.openings)
    view = store.begin(periods, windows, firsts, batch.progress, ids, decides=decides)
    moves = _Moves(view)
    for one in firsts:
        if one.id in view.settled:
            _settle(one, moves)
    stale = [one for one in firsts if one.id not in view.settled]
    if stale or seconds:
        rows = store.closed({one.id for one in (*stale, *seconds)})
        for one in stale:
            one.outcome = _closed_before(one, rows.get(one.id), is_retry=is_retry)
        for one in seconds:
            one.outcome = _closed_before(one, rows.get(one.id), is_retry=False)
    opened: dict[str, Opening] = {}
    for one in batch.openings:
        one.outcome = _open(one, moves, view, opened)
    store.commit([one.row for one in opened.values()], moves.moves, moves.adds)


def _distinct(settlings: list[Settling]) -> tuple[list[Settling], list[Settling]]:
    """Split into the first of each row, and those that close the same row again."""
    first: dict[str, Settling] = {}
    again = [one for one in settlings if first.setdefault(one.id, one) is not one]
    return list(first.values()), again


def _keys(batch: Batch) -> tuple[list[PeriodKey], list[PeriodKey]]:
    periods: set[PeriodKey] = set()
    windows: set[PeriodKey] = set()
    for one in batch.settlings:
        periods.update(key for key, _, _ in one.periods)
        windows.update(key for key, _ in one.windows)
    for one in batch.openings:
        periods.update((budget.id, start) for budget, start, _ in one.budgets)
        windows.update((limit.id, one.window) for limit, _ in one.limits)
    return sorted(periods), sorted(windows)


def _settle(one: Settling, moves: _Moves) -> None:
    for key, released, spent in one.periods:
        moves.move(key, -released, spent)
    for key, used in one.windows:
        moves.add(key, used)
    one.outcome = one.receipt


def _closed_before(one: Settling, row: tuple | None, *, is_retry: bool) -> Receipt | MxnError:
    if row is None:
        return InternalError(f"usage row {one.id} does not exist and cannot be settled")
    _, _, settled_us, reason, cost_micro, currency = row
    is_ours = is_retry and settled_us == one.settled_us and reason == one.reason
    return Receipt(usage_id=one.id, cost_micro=cost_micro, currency=currency, is_new=is_ours)


def _open(
    one: Opening, moves: _Moves, view: View, opened: dict[str, Opening]
) -> Ticket | MxnError | None:
    """Return the ticket of a request that fits, with its row added to `opened`."""
    if one.id in view.existing:
        is_ours = one.is_tried and view.existing[one.id] == (one.row[2], one.ticket.opened_us)
        return one.ticket if is_ours else _used_before(one)
    if one.id in opened:
        return _used_before(one)
    if one.is_abandoned:
        return None
    for limit, amount in one.limits:
        used = moves.used[limit.id, one.window]
        # Output is known at the end only: a request may start while there is some left.
        needed = 1 if limit.kind == "output_tokens" else amount
        if used + needed > limit.per_minute:
            return _limited(limit, used, needed, _left_s(one))
    for budget, start, amount in one.budgets:
        reserved, spent = moves.reserved_spent[budget.id, start]
        if reserved + spent + amount > budget.limit_amount:
            return _no_quota(budget, reserved, spent, amount)
    for limit, amount in one.limits:
        moves.add((limit.id, one.window), amount)
    for budget, start, amount in one.budgets:
        moves.move((budget.id, start), amount, 0)
    opened[one.id] = one
    return _with_limits(one, moves) if one.limits else one.ticket


def _with_limits(one: Opening, moves: _Moves) -> Ticket:
    reset_s = _left_s(one)
    states = tuple(
        LimitState(
            kind=limit.kind, limit=limit.per_minute, reset_s=reset_s,
            remaining=max(0, limit.per_minute - moves.used[limit.id, one.window]),
        )
        for limit, _ in one.limits
    )  # fmt: skip
    plain = one.ticket
    return Ticket(
        usage=plain.usage, opened_us=plain.opened_us, reserved=plain.reserved, limits=states
    )


def _left_s(one: Opening) -> float:
    """Return how long the minute it is counted in goes on."""
    return (one.window + WINDOW_US - one.ticket.opened_us) / 1e6


def _used_before(one: Opening) -> InternalError:
    return InternalError(f"usage id {one.id!r} was used before")


def _limited(limit: Limit, used: int, needed: int, left_s: float) -> RateLimitError:
    what = limit.kind.replace("_", " ")
    model = f" of {limit.model}" if limit.model else ""
    hint = f"wait {left_s:.1f} s"
    if needed > limit.per_minute:
        hint = f"this request alone needs {needed} {what}, more than the limit"
    return RateLimitError(
        f"the limit of {limit.subject} is {limit.per_minute} {what}{model} per minute; "
        f"{used} are used and this request needs {needed}",
        kind=limit.kind, retry_after_s=left_s, hint=hint,
    )  # fmt: skip


def _no_quota(budget: Budget, reserved: int, spent: int, amount: int) -> QuotaError:
    def show(value: int) -> str:
        if budget.unit == "micro":
            return format_money(value, budget.currency)
        return f"{value} tokens"

    left = max(0, budget.limit_amount - reserved - spent)
    period = "" if budget.period == "total" else f" per {budget.period}"
    return QuotaError(
        f"budget {budget.id} of {budget.subject} is {show(budget.limit_amount)}{period}: "
        f"{show(spent)} spent, {show(reserved)} reserved by requests under way, {show(left)} left; "
        f"this request may need {show(amount)}",
        retry_after_s=_RESERVED_S if spent + amount <= budget.limit_amount else None,
        hint="lower max_tokens, or have the budget raised",
    )
