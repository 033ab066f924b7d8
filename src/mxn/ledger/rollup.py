"""Sums of usage: per day in one time zone, kept in `usage_days`, and for any question one may ask.

A row belongs to the day it was settled, so that a day that is over gets no more rows. The sums of
`summarize` are those of the rows themselves: rolled-up days where they lie whole in the asked time,
and rows for the rest. Functions on a connection; the caller ends the transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import tzinfo
from typing import Any

from sqlalchemy import Connection, delete, func, insert, literal, select

from mxn.errors import ConfigError
from mxn.ledger import schema
from mxn.ledger.moments import MAX_US, day_of, day_start_us, next_day, parse_zone

# Rows of a day may become visible shortly after its end: transactions under way, slow clocks.
GRACE_US = 15 * 60 * 1_000_000

KEYS = ("org_id", "project_id", "user_id", "key_id", "model", "chip", "currency")
SUMS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "device_us",
        "cost_micro")  # fmt: skip
MEASURES = ("requests", *SUMS)
GROUPS: Mapping[str, str] = {
    "org": "org_id", "project": "project_id", "user": "user_id", "key": "key_id",
    "model": "model", "chip": "chip", "day": "day",
}  # fmt: skip

Totals = dict[tuple[str, ...], list[int]]


def roll_up(
    connection: Connection, zone_name: str, *, now_us: int, is_rebuild: bool = False
) -> list[str]:
    """Roll up every day that is over and is not yet, and return those that had rows.

    Another time zone than the last time, or `is_rebuild`, does all days again.
    Raises: ConfigError for an unknown time zone.
    """
    zone = parse_zone(zone_name)
    known = connection.execute(select(schema.rollup_state)).first()
    if known is None or known.time_zone != zone_name or is_rebuild:
        connection.execute(delete(schema.usage_days))
        known = None
    end = day_of(max(0, now_us - GRACE_US), zone)
    first = known.through_day if known else day_of(0, zone)
    done = list(_days_with_rows(connection, first, end, zone))
    for day in done:
        _roll_day(connection, day, zone)
    connection.execute(delete(schema.rollup_state))
    values = {"id": 1, "time_zone": zone_name, "through_day": max(first, end)}
    connection.execute(insert(schema.rollup_state).values(**values))
    return done


def summarize(
    connection: Connection,
    by: Iterable[str] = (),
    *,
    since_us: int = 0,
    until_us: int = MAX_US,
    zone_name: str = "UTC",
    where: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return sums of settled requests per group, with `currency`, in the order of the groups.

    `by` is some of `GROUPS`; `where` maps columns such as `org_id` or `model` to what they must be.
    Raises: ConfigError for an unknown group or time zone.
    """
    groups = tuple(dict.fromkeys(by))
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ConfigError(f"usage is grouped by {', '.join(GROUPS)}, got {', '.join(unknown)}")
    columns = tuple(GROUPS[name] for name in groups)
    zone, filters = parse_zone(zone_name), dict(where or {})
    totals: Totals = {}
    rolled = _rolled_days(connection, since_us, until_us, zone_name, zone)
    if rolled is None:
        _add_rows(connection, totals, columns, since_us, until_us, zone, filters)
    else:
        first, end = rolled
        _add_days(connection, totals, columns, first, end, filters)
        _add_rows(connection, totals, columns, since_us, day_start_us(first, zone), zone, filters)
        _add_rows(connection, totals, columns, day_start_us(end, zone), until_us, zone, filters)
    names = (*groups, "currency")
    return [
        dict(zip(names, key, strict=True)) | dict(zip(MEASURES, values, strict=True))
        for key, values in sorted(totals.items())
    ]


def rollup_problems(connection: Connection) -> Iterator[str]:
    """Yield a line for each rolled-up day whose sums are not those of its rows."""
    known = connection.execute(select(schema.rollup_state)).first()
    if known is None:
        return
    zone, days = parse_zone(known.time_zone), schema.usage_days
    sums = [func.sum(days.c[name]) for name in MEASURES]
    rolled = {
        row[0]: [int(value) for value in row[1:]]
        for row in connection.execute(select(days.c.day, *sums).group_by(days.c.day))
    }
    made: Totals = {}
    end_us = day_start_us(known.through_day, zone)
    _add_rows(connection, made, ("day",), 0, end_us, zone, {})
    found: dict[str, list[int]] = {}
    for (day, _), values in made.items():
        before = found.get(day, [0] * len(values))
        found[day] = [a + b for a, b in zip(before, values, strict=True)]
    for day in sorted(rolled.keys() | found.keys()):
        empty = [0] * len(MEASURES)
        for name, said, real in zip(
            MEASURES, rolled.get(day, empty), found.get(day, empty), strict=True
        ):
            if said != real:
                yield f"day {day}: the roll-up says {said} {name}, its rows {real}"


def _rolled_days(
    connection: Connection, since_us: int, until_us: int, zone_name: str, zone: tzinfo
) -> tuple[str, str] | None:
    """Return (first day, day behind the last) of the roll-up that lie whole in an interval."""
    known = connection.execute(select(schema.rollup_state)).first()
    if known is None or known.time_zone != zone_name:
        return None
    first = day_of(since_us, zone)
    if day_start_us(first, zone) < since_us:
        first = next_day(first)
    end = min(known.through_day, day_of(min(until_us, MAX_US), zone))
    return (first, end) if first < end else None


def _roll_day(connection: Connection, day: str, zone: tzinfo) -> None:
    days, usage = schema.usage_days, schema.usage
    connection.execute(delete(days).where(days.c.day == day))
    keys = [func.coalesce(usage.c[name], "") for name in KEYS]
    sums = [func.sum(usage.c[name]) for name in SUMS]
    start_us, end_us = day_start_us(day, zone), day_start_us(next_day(day), zone)
    rows = (
        select(literal(day), *keys, func.count(), *sums)
        .where(*_settled(start_us, end_us)).group_by(*keys)
    )  # fmt: skip
    names = ["day", *KEYS, "requests", *SUMS]
    connection.execute(insert(days).from_select(names, rows))


def _days_with_rows(connection: Connection, first: str, end: str, zone: tzinfo) -> Iterator[str]:
    """Yield days from `first` to before `end` that have settled rows, without a look at others."""
    day, usage = first, schema.usage
    while day < end:
        start_us, end_us = day_start_us(day, zone), day_start_us(end, zone)
        query = select(func.min(usage.c.settled_us)).where(*_settled(start_us, end_us))
        earliest = connection.execute(query).scalar()
        if earliest is None:
            return
        day = day_of(earliest, zone)
        yield day
        day = next_day(day)


def _add_days(
    connection: Connection, totals: Totals, columns: tuple[str, ...], first: str, end: str,
    filters: Mapping[str, str],
) -> None:  # fmt: skip
    days = schema.usage_days
    keys = [days.c[name] for name in (*columns, "currency")]
    sums = [func.sum(days.c[name]) for name in MEASURES]
    query = select(*keys, *sums).where(days.c.day >= first, days.c.day < end).group_by(*keys)
    for name, value in filters.items():
        query = query.where(days.c[name] == value)
    _merge(totals, connection.execute(query), len(keys))


def _add_rows(
    connection: Connection, totals: Totals, columns: tuple[str, ...], since_us: int,
    until_us: int, zone: tzinfo, filters: Mapping[str, str],
) -> None:  # fmt: skip
    """Add rows of an interval; day by day where days are asked, since SQL knows no time zones."""
    if since_us >= until_us:
        return
    if "day" not in columns:
        _add_interval(connection, totals, columns, since_us, until_us, None, filters)
        return
    first, end = day_of(since_us, zone), next_day(day_of(min(until_us, MAX_US) - 1, zone))
    for day in _days_with_rows(connection, first, end, zone):
        start_us = max(since_us, day_start_us(day, zone))
        end_us = min(until_us, day_start_us(next_day(day), zone))
        _add_interval(connection, totals, columns, start_us, end_us, day, filters)


def _add_interval(
    connection: Connection, totals: Totals, columns: tuple[str, ...], since_us: int,
    until_us: int, day: str | None, filters: Mapping[str, str],
) -> None:  # fmt: skip
    usage = schema.usage
    names = [name for name in (*columns, "currency") if name != "day"]
    keys = [func.coalesce(usage.c[name], "").label(f"key_{name}") for name in names]
    sums = [func.sum(usage.c[name]) for name in SUMS]
    query = select(*keys, func.count(), *sums).where(*_settled(since_us, until_us)).group_by(*keys)
    for name, value in filters.items():
        query = query.where(usage.c[name] == value)
    rows: Iterable[Any] = connection.execute(query)
    if day is not None:
        at = columns.index("day")
        rows = [(*row[:at], day, *row[at:]) for row in rows]
    _merge(totals, rows, len(columns) + 1)


def _merge(totals: Totals, rows: Iterable[Any], num_keys: int) -> None:
    for row in rows:
        key = tuple(row[:num_keys])
        found = totals.setdefault(key, [0] * len(MEASURES))
        for index, value in enumerate(row[num_keys:]):
            found[index] += int(value or 0)  # PostgreSQL sums are Decimals


def _settled(since_us: int, until_us: int) -> tuple[Any, ...]:
    usage = schema.usage
    return (
        usage.c.state == "settled", usage.c.settled_us >= since_us, usage.c.settled_us < until_us
    )  # fmt: skip
