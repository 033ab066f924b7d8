"""Budgets as an administrator sets and reads them. Functions on a connection; `open` and `settle`
reserve and spend them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from sqlalchemy import Connection, func, insert, select, update

from mxn.errors import ConfigError, NotFoundError
from mxn.ledger import schema
from mxn.ledger.money import MAX_MICRO, check_currency
from mxn.ledger.tenants import Subject, new_id

Unit = Literal["tokens", "micro"]
Period = Literal["total", "day", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)


def set_budget(
    connection: Connection,
    subject: Subject,
    *,
    limit_amount: int,
    period: str,
    now_us: int,
    currency: str | None = None,
) -> str:
    """Return the id of a budget, made or changed: of money with a currency, of tokens without one.

    What was spent in the present period stays spent when the limit changes.
    Raises: ConfigError for a period or an amount that cannot be.
    """
    if period not in PERIODS:
        raise ConfigError(f"a budget is per {', '.join(PERIODS)}, got {period!r}")
    if not 0 <= limit_amount <= MAX_MICRO:
        raise ConfigError(f"a budget must be from 0 to {MAX_MICRO}, got {limit_amount}")
    table = schema.budgets
    wanted = {
        "subject_kind": subject.kind, "subject_id": subject.id, "period": period,
        "unit": "tokens" if currency is None else "micro",
        "currency": "" if currency is None else check_currency(currency),
    }  # fmt: skip
    same = [table.c[name] == value for name, value in wanted.items()]
    known = connection.execute(select(table.c.id).where(*same)).scalar()
    if known is not None:
        change = update(table).where(table.c.id == known)
        connection.execute(change.values(limit_amount=limit_amount, is_active=True))
        return str(known)
    budget_id = new_id("budget")
    row = {"id": budget_id, "limit_amount": limit_amount, "created_us": now_us, "is_active": True}
    connection.execute(insert(table).values(**wanted, **row))
    return budget_id


def list_budgets(connection: Connection) -> list[dict[str, Any]]:
    """Return budgets in force with what is `reserved`, `spent` and `left` of the latest period."""
    budgets, periods = schema.budgets, schema.budget_periods
    latest = (
        select(periods.c.budget_id, func.max(periods.c.period_start).label("period_start"))
        .group_by(periods.c.budget_id).subquery()
    )  # fmt: skip
    query = (
        select(budgets, periods.c.period_start, periods.c.reserved, periods.c.spent)
        .select_from(budgets)
        .outerjoin(latest, latest.c.budget_id == budgets.c.id)
        .outerjoin(
            periods,
            (periods.c.budget_id == budgets.c.id)
            & (periods.c.period_start == latest.c.period_start),
        )
        .where(budgets.c.is_active)
        .order_by(budgets.c.subject_kind, budgets.c.subject_id, budgets.c.period, budgets.c.id)
    )
    rows = [dict(row._mapping) for row in connection.execute(query)]
    for row in rows:
        row["reserved"], row["spent"] = row["reserved"] or 0, row["spent"] or 0
        row["left"] = row["limit_amount"] - row["spent"] - row["reserved"]
    return rows


def remove_budget(connection: Connection, budget_id: str) -> None:
    """Lift a budget; its history stays. Raises: NotFoundError."""
    table = schema.budgets
    change = update(table).where(table.c.id == budget_id, table.c.is_active)
    if connection.execute(change.values(is_active=False)).rowcount != 1:
        raise NotFoundError(f"no budget {budget_id!r}", hint="`mxn budget list` shows them")
