"""Rows of the ledger and price lists as CSV, JSON and TOML. Columns keep their order for ever: new
ones are added at the end."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, select

from mxn.errors import ConfigError
from mxn.ledger import schema
from mxn.ledger.moments import iso, parse_moment, parse_zone
from mxn.ledger.money import format_decimal, format_money, parse_decimal
from mxn.ledger.prices import NewPrice
from mxn.ledger.pricing import ANY, KINDS, Price

USAGE_COLUMNS = (
    "id", "request_id", "opened_us", "settled_us", "org_id", "project_id", "user_id", "key_id",
    "endpoint", "model", "chip", "replica", "state", "reason", "status", "is_stream",
    "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "device_us",
    "num_replicas", "basis", "cost_micro", "currency", "prices", "batch_id", "gateway_id",
)  # fmt: skip
PRICE_COLUMNS = ("model", "chip", "kind", "price", "currency", "valid_from", "valid_to")

# Decimals of the price as people say it: a request is priced one by one, tokens by the million.
_DECIMALS = {"request": 12}


def usage_rows(
    connection: Connection, *, since_us: int, until_us: int, where: Mapping[str, str],
    limit: int | None = None, is_newest_first: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield requests that were opened in an interval, also those under way, in order of opening."""
    usage = schema.usage
    order = (usage.c.opened_us, usage.c.id)
    query = (
        select(*(usage.c[name] for name in USAGE_COLUMNS))
        .where(usage.c.opened_us >= since_us, usage.c.opened_us < until_us)
        .order_by(*(column.desc() for column in order) if is_newest_first else order)
        .limit(limit)
    )
    for name, value in where.items():
        query = query.where(usage.c[name] == value)
    for row in connection.execution_options(yield_per=1000).execute(query):
        yield dict(row._mapping)


def to_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a CSV file with a head; None is an empty cell."""
    names = list(columns)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        yield from _taken(buffer)
        writer.writerow({name: "" if row.get(name) is None else row[name] for name in names})
    yield from _taken(buffer)


def format_price(price: Price | NewPrice) -> str:
    """Return a price as people say it: for a million tokens, for one request, for a second."""
    return format_decimal(price.micro_per_million, decimals=_DECIMALS.get(price.kind, 6))


def parse_price(text: str, kind: str) -> int:
    """Return micro-units per million of what `format_price` printed. Raises: ConfigError."""
    return parse_decimal(text, decimals=_DECIMALS.get(kind, 6), what=f"{kind} price")


def per(kind: str) -> str:
    """Return what a price as people say it is for."""
    return {"request": "request", "device_second": "device-second"}.get(kind, "1M tokens")


def price_row(price: Price) -> dict[str, Any]:
    """Return a price with the columns of a price list."""
    return {
        "model": price.model, "chip": price.chip, "kind": price.kind,
        "price": format_price(price), "currency": price.currency,
        "valid_from": iso(price.valid_from_us), "valid_to": iso(price.valid_to_us),
    }  # fmt: skip


def write_price_list(prices: Iterable[Price], style: str) -> str:
    """Return a price list as ``toml``, ``csv`` or ``json``, to be read by `read_price_list`."""
    rows = [price_row(price) for price in prices]
    if style == "csv":
        return "".join(to_csv(PRICE_COLUMNS, rows))
    if style == "json":
        return json.dumps(rows, indent=2) + "\n"
    if style != "toml":
        raise ConfigError(f"a price list is toml, csv or json, got {style!r}")
    tables = []
    for row in rows:
        lines = [f"{name} = {json.dumps(row[name])}" for name in PRICE_COLUMNS if row[name]]
        tables.append("\n".join(["[[price]]", *lines, ""]))
    return "\n".join(tables)


def read_price_list(text: str, style: str, *, now_us: int) -> list[NewPrice]:
    """Return the prices of a list. A price without `valid_from` starts now.

    Raises: ConfigError with the number of the entry that cannot be read.
    """
    try:
        if style == "csv":
            rows: Any = list(csv.DictReader(io.StringIO(text)))
        elif style == "json":
            rows = json.loads(text)
        else:
            rows = tomllib.loads(text).get("price", [])
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ConfigError(f"the price list is not {style}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("a price list is a list of prices")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_read_price(row, now_us))
        except ConfigError as error:
            raise ConfigError(f"price {number}: {error.message}", hint=error.hint) from None
    return found


def describe_amount(micro: int, currency: str) -> str:
    return format_money(micro, currency or "(no price)")


def _read_price(row: Mapping[str, Any], now_us: int) -> NewPrice:
    unknown = sorted(str(name) for name in row if name not in PRICE_COLUMNS)
    if unknown:
        raise ConfigError(f"unknown {unknown}; a price has {', '.join(PRICE_COLUMNS)}")
    values = {name: row.get(name) or "" for name in PRICE_COLUMNS}
    for name, value in values.items():
        if not isinstance(value, str):  # a TOML float would not be exact money
            raise ConfigError(f"{name} must be a text in quotes, got {value!r}")
    if values["kind"] not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {values['kind']!r}")

    def moment(name: str) -> int | None:
        text = values[name]
        return parse_moment(text, zone=parse_zone("UTC"), now_us=now_us) if text else None

    start_us = moment("valid_from")
    return NewPrice(
        model=values["model"] or ANY, chip=values["chip"] or ANY, kind=values["kind"],
        micro_per_million=parse_price(values["price"], values["kind"]),
        currency=values["currency"], valid_to_us=moment("valid_to"),
        valid_from_us=now_us if start_us is None else start_us,
    )  # fmt: skip


def _taken(buffer: io.StringIO) -> Iterator[str]:
    yield buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
