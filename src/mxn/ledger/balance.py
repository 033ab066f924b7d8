"""Whether the books balance: what budgets say against what the rows say. Reads only.

For each budget and period, `reserved` must be the sum of what open rows hold, and `spent` that of
what settled rows cost. Days that are rolled up must be the sums of their rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, select

from mxn.ledger import schema
from mxn.ledger.compose import decode_reserved, is_billed, spent_of
from mxn.ledger.database import Database
from mxn.ledger.operations import PeriodKey
from mxn.ledger.pricing import cost, decode_applied, quantities
from mxn.ledger.rollup import rollup_problems

_COLUMNS = (
    "id", "state", "settled_us", "reason", "input_tokens", "cached_tokens", "output_tokens",
    "reasoning_tokens", "device_us", "cost_micro", "currency", "prices", "reserved",
)  # fmt: skip
_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "device_us")


def check(database: Database) -> list[str]:
    """Return every problem as a line for people; an empty list: the books balance.

    Sees one state of the database, also while gateways write.
    """
    with database.read() as connection:
        return [*_problems(connection), *rollup_problems(connection)]


def _problems(connection: Connection) -> Iterator[str]:
    budgets, periods = schema.budgets, schema.budget_periods
    units = {
        row.id: (row.unit, row.currency)
        for row in connection.execute(select(budgets.c.id, budgets.c.unit, budgets.c.currency))
    }
    wanted: dict[PeriodKey, list[int]] = defaultdict(lambda: [0, 0])
    query = select(*(schema.usage.c[name] for name in _COLUMNS))
    for row in connection.execution_options(yield_per=1000).execute(query):
        yield from _row_problems(row)
        _add(wanted, row, units)
    for row in connection.execute(select(periods)):
        reserved, spent = wanted.pop((row.budget_id, row.period_start), (0, 0))
        name = f"budget {row.budget_id}, period {row.period_start}"
        if row.reserved != reserved:
            yield f"{name}: {row.reserved} reserved, but open rows hold {reserved}"
        if row.spent != spent:
            yield f"{name}: {row.spent} spent, but settled rows cost {spent}"
    for (budget_id, start), (reserved, spent) in wanted.items():
        if reserved or spent:
            yield (
                f"budget {budget_id}, period {start}: has no row, but rows of usage hold "
                f"{reserved} and cost {spent}"
            )


def _add(wanted: dict[PeriodKey, list[int]], row: Any, units: dict[str, tuple[str, str]]) -> None:
    tokens = row.input_tokens + row.output_tokens
    if row.state == "settled" and not is_billed(row.reason, row.output_tokens):
        tokens = 0
    for budget_id, start, amount in decode_reserved(row.reserved):
        found = wanted[budget_id, start]
        if row.state == "open":
            found[0] += amount
        else:
            found[1] += spent_of(units, budget_id, tokens, row.cost_micro, row.currency)


def _row_problems(row: Any) -> Iterator[str]:
    if row.state == "open":
        if row.settled_us is not None or row.cost_micro:
            yield f"row {row.id} is open and has been settled"
        return
    if row.state != "settled" or row.settled_us is None or row.reason is None:
        yield f"row {row.id} is {row.state!r} without a time or a reason"
        return
    applied = decode_applied(row.prices)
    due = cost(quantities(**{name: getattr(row, name) for name in _TOKENS}), applied)
    if due != row.cost_micro:
        yield f"row {row.id} costs {row.cost_micro}, but its prices make {due}"
