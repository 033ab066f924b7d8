"""The statement of an owner for a month, from the rows themselves. Functions on a connection.

A line is model × chip × kind × price: quantity × price, rounded half up to the micro-unit. A
request was rounded once when it was settled, so lines and requests can differ by half a micro-unit
each; that difference is a line of its own, and the total is exactly the sum of the requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, func, select

from mxn.errors import InternalError
from mxn.ledger import schema
from mxn.ledger.pricing import KINDS, PriceKind, decode_applied, quantities, round_half_up
from mxn.ledger.rollup import SUMS


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """`quantity` is in `pricing.UNITS`; `micro_per_million` None: there was no price, so free."""

    model: str
    chip: str
    kind: PriceKind
    quantity: int
    micro_per_million: int | None
    amount_micro: int


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of one currency; "" is for requests without any price."""

    currency: str
    requests: int
    lines: list[Line]
    rounding_micro: int
    total_micro: int


def statement(
    connection: Connection, *, since_us: int, until_us: int, where: Mapping[str, str]
) -> list[Bill]:
    """Return one bill for each currency, of the requests settled in an interval.

    `where` maps columns such as `org_id` to what they must be.
    Raises: InternalError when requests do not cost what their own prices say.
    """
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in _grouped_rows(connection, since_us, until_us, where):
        groups[row.currency].append(row)
    return [_bill(currency, rows) for currency, rows in sorted(groups.items())]


def _grouped_rows(
    connection: Connection, since_us: int, until_us: int, where: Mapping[str, str]
) -> list[Any]:
    """Sum rows that were billed by the same prices: they are few, however many requests."""
    usage = schema.usage
    keys = [
        func.coalesce(usage.c[name], "").label(name)
        for name in ("model", "chip", "prices", "currency")
    ]
    sums = [func.sum(usage.c[name]).label(name) for name in SUMS]
    query = select(*keys, func.count().label("requests"), *sums).where(
        usage.c.state == "settled", usage.c.settled_us >= since_us, usage.c.settled_us < until_us
    ).group_by(*keys)  # fmt: skip
    for name, value in where.items():
        query = query.where(usage.c[name] == value)
    return list(connection.execute(query))


def _bill(currency: str, rows: list[Any]) -> Bill:
    lines: dict[tuple[str, str, int, int], int] = defaultdict(int)
    for row in rows:
        applied = decode_applied(row.prices)
        names = [name for name in SUMS if name != "cost_micro"]
        amounts = quantities(
            requests=int(row.requests), **{name: int(getattr(row, name) or 0) for name in names}
        )
        for index, kind in enumerate(KINDS):
            rate = applied[kind].micro_per_million if kind in applied else -1
            is_token = kind not in ("request", "device_second")
            if amounts[kind] and (rate >= 0 or is_token):
                lines[row.model, row.chip, index, rate] += amounts[kind]
    made = [_line(key, quantity) for key, quantity in sorted(lines.items())]
    requests = sum(int(row.requests) for row in rows)
    total = sum(int(row.cost_micro or 0) for row in rows)
    rounding = total - sum(line.amount_micro for line in made)
    if 2 * abs(rounding) > requests + len(made):
        raise InternalError(
            f"{requests} requests cost {total} micro {currency}, and their prices make "
            f"{total - rounding}", hint="`mxn usage check` names the rows",
        )  # fmt: skip
    return Bill(
        currency=currency, requests=requests, lines=made, rounding_micro=rounding, total_micro=total
    )


def _line(key: tuple[str, str, int, int], quantity: int) -> Line:
    model, chip, index, rate = key
    return Line(
        model=model, chip=chip, kind=KINDS[index], quantity=quantity,
        micro_per_million=None if rate < 0 else rate,
        amount_micro=0 if rate < 0 else round_half_up(quantity * rate),
    )  # fmt: skip
