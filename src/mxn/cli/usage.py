"""`mxn usage`: what was used, by whom, and what it costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mxn.cli.ledger import (
    DatabaseUrl,
    Key,
    Org,
    Project,
    User,
    filters,
    print_json,
    print_table,
    reading,
    transaction,
)  # fmt: skip
from mxn.cli.options import Json

app = typer.Typer(help="Usage and cost: sums, single requests, statements.")
Since = Annotated[str, typer.Option(help="From: 2026-11-01, 2026-11-01T12:30 or 7d (ago).")]
Until = Annotated[str, typer.Option(help="Up to, not including.")]
Zone = Annotated[str, typer.Option("--time-zone", help="Whose midnight; by default MXN_TIME_ZONE.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")]
_NAMED = {"org": "organizations", "project": "projects", "user": "users", "key": "api_keys"}
_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


@app.callback(invoke_without_command=True)
def usage(
    context: typer.Context,
    by: Annotated[
        str, typer.Option(help="Some of org,project,user,key,model,chip,day.")
    ] = "model,chip",
    since: Since = "",
    until: Until = "",
    zone: Zone = "",
    org: Org = "", project: Project = "", user: User = "", key: Key = "",
    model: Annotated[str, typer.Option(help="Of this model only.")] = "",
    database: DatabaseUrl = "", as_json: Json = False, as_csv: Csv = False,
) -> None:  # fmt: skip
    """Print sums of settled requests, from roll-ups and from rows that are not rolled up yet."""
    if context.invoked_subcommand is not None:
        return
    from mxn.ledger import rollup, schema, tenants

    groups = [word.strip() for word in by.split(",") if word.strip()]
    zone, start, end = _interval(since, until, zone)
    with reading(database) as connection:
        where = filters(connection, org, project, user, key) | ({"model": model} if model else {})
        rows = rollup.summarize(
            connection, groups, since_us=start, until_us=end, zone_name=zone, where=where
        )
        names = {
            group: tenants.names_of(connection, schema.metadata.tables[table])
            for group, table in _NAMED.items() if group in groups
        }  # fmt: skip
    head = [*groups, "currency", *rollup.MEASURES]
    if as_json:
        print_json([{name: row[name] for name in head} for row in rows])
    elif as_csv:
        _print_csv(head, rows)
    else:
        _print_sums(rows, list(dict.fromkeys(groups)), names)


@app.command("rows")
def rows(
    since: Since = "",
    until: Until = "",
    zone: Zone = "",
    org: Org = "", project: Project = "", user: User = "", key: Key = "",
    limit: Annotated[int, typer.Option(min=0, help="At most; 0: all.")] = 50,
    database: DatabaseUrl = "", as_json: Json = False, as_csv: Csv = False,
) -> None:  # fmt: skip
    """Print single requests, the newest first, also those under way."""
    from mxn.ledger.export import USAGE_COLUMNS, usage_rows
    from mxn.ledger.moments import format_us
    from mxn.ledger.money import format_money

    _, start, end = _interval(since, until, zone)
    with reading(database) as connection:
        where = filters(connection, org, project, user, key)
        found = usage_rows(
            connection, since_us=start, until_us=end, where=where, limit=limit or None,
            is_newest_first=True,
        )  # fmt: skip
        if as_csv:
            _print_csv(USAGE_COLUMNS, found)
            return
        kept = list(found)
    if as_json:
        print_json(kept)
        return
    print_table(
        ("request", "opened (UTC)", "model", "chip", "state", "reason", "input", "cached",
         "output", "cost"),
        [(row["id"], format_us(row["opened_us"]), row["model"], row["chip"], row["state"],
          row["reason"], row["input_tokens"], row["cached_tokens"], row["output_tokens"],
          format_money(row["cost_micro"], row["currency"])) for row in kept],
        numbers=("input", "cached", "output", "cost"), empty="no requests",
    )  # fmt: skip


@app.command("statement")
def statement(
    month: Annotated[str, typer.Option(help="Such as 2026-11.")],
    org: Org = "", project: Project = "", user: User = "", key: Key = "", zone: Zone = "",
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Print what one owner owes for a month, to the micro-unit."""
    import msgspec

    from mxn.ledger import statements
    from mxn.ledger.moments import month_bounds_us, parse_zone

    zone = zone or _default_zone()
    start, end = month_bounds_us(month, parse_zone(zone))
    with reading(database) as connection:
        where = filters(connection, org, project, user, key)
        bills = statements.statement(connection, since_us=start, until_us=end, where=where)
    if as_json:
        print_json({"month": month, "time_zone": zone, "owner": where, "since_us": start,
                    "until_us": end, "bills": msgspec.to_builtins(bills)})  # fmt: skip
        return
    for bill in bills:
        _print_bill(bill)
    if not bills:
        typer.echo("no settled requests in this month", err=True)


@app.command("rollup")
def rollup_(
    zone: Zone = "",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="All days again.")] = False,
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Sum up the days that are over; sums stay the same and come faster."""
    from mxn.ledger import rollup
    from mxn.ledger.moments import now_us

    with transaction(database) as connection:
        done = rollup.roll_up(
            connection, zone or _default_zone(), now_us=now_us(), is_rebuild=rebuild
        )
    if as_json:
        print_json({"days": done})
    else:
        typer.echo(f"{len(done)} days rolled up")


@app.command("check")
def check_(database: DatabaseUrl = "", as_json: Json = False) -> None:
    """See whether the books balance: rows, costs, budgets and roll-ups. Ends with 1 if not."""
    from mxn.ledger import balance
    from mxn.ledger.database import Database

    opened = Database.open(database or None)
    try:
        problems = balance.check(opened)
    finally:
        opened.close()
    if as_json:
        print_json({"problems": problems})
    else:
        for line in problems:
            typer.echo(line)
        typer.echo(f"{len(problems)} problems" if problems else "the books balance", err=True)
    if problems:
        raise typer.Exit(1)


def _interval(since: str, until: str, zone: str) -> tuple[str, int, int]:
    from mxn.errors import ConfigError
    from mxn.ledger.moments import MAX_US, now_us, parse_moment, parse_zone

    name = zone or _default_zone()
    place, now = parse_zone(name), now_us()
    start = parse_moment(since, zone=place, now_us=now) if since else 0
    end = parse_moment(until, zone=place, now_us=now) if until else MAX_US
    if start > end:
        raise ConfigError(f"--since {since!r} is later than --until {until or 'now'!r}")
    return name, start, end


def _default_zone() -> str:
    from mxn import env

    return env.get("MXN_TIME_ZONE")


def _print_csv(head: Any, rows: Any) -> None:
    from mxn.ledger.export import to_csv

    for text in to_csv(head, rows):
        typer.echo(text, nl=False)


def _print_sums(
    rows: list[dict[str, Any]], groups: list[str], names: dict[str, dict[str, str]]
) -> None:
    from mxn.ledger.money import format_money

    def cells(row: dict[str, Any]) -> list[str]:
        counts = [f"{row[name]:,}" for name in ("requests", *_TOKENS)]
        device_s = f"{row['device_us'] / 1e6:,.1f}"
        return [*counts, device_s, format_money(row["cost_micro"], row["currency"])]

    numbers = ["requests", "input", "cached", "output", "reasoning", "device-s", "cost"]
    shown = [
        [*(names.get(group, {}).get(row[group], row[group]) for group in groups), *cells(row)]
        for row in rows
    ]
    currencies = {row["currency"] for row in rows if row["cost_micro"]}
    foot: list[str] = []
    if rows and groups and len(currencies) < 2:  # money of two currencies has no sum
        counted = ("requests", *_TOKENS, "device_us", "cost_micro")
        total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in counted}
        total["currency"] = next(iter(currencies), "")
        foot = ["total", *[""] * (len(groups) - 1), *cells(total)]
    print_table([*groups, *numbers], shown, numbers=numbers, foot=foot, empty="no usage")


def _print_bill(bill: Any) -> None:
    from mxn.ledger.money import format_decimal, format_money

    lines = []
    for line in bill.lines:
        is_device = line.kind == "device_second"
        quantity = format_decimal(line.quantity) if is_device else f"{line.quantity:,}"
        rate, unit = line.micro_per_million, {"request": "request", "device_second": "s"}
        decimals = 12 if line.kind == "request" else 6
        price = "no price" if rate is None else (
            f"{format_decimal(rate, decimals=decimals)} / {unit.get(line.kind, '1M')}"
        )  # fmt: skip
        amount = format_money(line.amount_micro)
        lines.append((line.model, line.chip, line.kind, quantity, price, amount))
    lines.append((f"rounding of {bill.requests:,} requests", "", "", "", "",
                  format_money(bill.rounding_micro)))  # fmt: skip
    print_table(
        ("model", "chip", "kind", "quantity", "price", "amount"), lines,
        numbers=("quantity", "price", "amount"),
        foot=("total", "", "", "", "", format_money(bill.total_micro, bill.currency)),
    )  # fmt: skip
