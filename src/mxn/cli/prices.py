"""`mxn price`: what tokens, requests and device-seconds cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxn.cli.ledger import DatabaseUrl, Yes, confirm, print_json, print_table, reading, transaction
from mxn.cli.options import Json

app = typer.Typer(help="Prices per model, chip and kind.", no_args_is_help=True)
Model = Annotated[str, typer.Argument(help="A model's name, or '*' for any.")]
Chip = Annotated[str, typer.Option(help="A chip, or '*' for any.")]
At = Annotated[str, typer.Option(help="A time: 2026-11-01, 2026-11-01T12:30 or now.")]
_HEAD = ("model", "chip", "kind", "price", "for", "from", "to")


@app.command("set")
def set_(
    model: Model,
    chip: Chip = "*",
    input: Annotated[str, typer.Option(help="For 1M input tokens.")] = "",
    cached: Annotated[str, typer.Option(help="For 1M cached input tokens.")] = "",
    output: Annotated[str, typer.Option(help="For 1M output tokens.")] = "",
    reasoning: Annotated[str, typer.Option(help="For 1M reasoning tokens.")] = "",
    request: Annotated[str, typer.Option(help="For one request.")] = "",
    device_second: Annotated[str, typer.Option(help="For a second of a device.")] = "",
    currency: Annotated[str, typer.Option(help="Such as USD, EUR or CNY.")] = "USD",
    start: Annotated[str, typer.Option("--from", help="When it starts.")] = "now",
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Set prices from a time on; those before end there and are kept."""
    from mxn.errors import ConfigError
    from mxn.ledger.export import parse_price
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import NewPrice, set_prices

    given = {"input": input, "cached": cached, "output": output, "reasoning": reasoning,
             "request": request, "device_second": device_second}  # fmt: skip
    if not any(given.values()):
        raise ConfigError("nothing to set: give --input, --output or another price")
    now = now_us()
    wanted = [
        NewPrice(model=model, chip=chip, kind=kind, micro_per_million=parse_price(text, kind),
                 currency=currency, valid_from_us=_moment(start, now))
        for kind, text in given.items() if text
    ]  # fmt: skip
    with transaction(database) as connection:
        added = set_prices(connection, wanted, now_us=now)
    _show(added, as_json, "those prices hold already")


@app.command("list")
def list_(
    at: At = "now",
    history: Annotated[bool, typer.Option("--history", help="All there ever were.")] = False,
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """List the prices that hold at a time."""
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import load_prices

    at_us = _moment(at, now_us())
    with reading(database) as connection:
        known = load_prices(connection)
    _show([price for price in known if history or price.holds_at(at_us)], as_json, "no price then")


@app.command("explain")
def explain(
    model: Model, chip: Chip = "*", at: At = "now", database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show which price applies to each kind, and why the others do not."""
    from mxn.ledger import prices
    from mxn.ledger.export import format_price, per, price_row
    from mxn.ledger.moments import now_us

    with reading(database) as connection:
        known = prices.load_prices(connection)
    found = prices.explain(known, model, chip, _moment(at, now_us()))
    if as_json:
        print_json([
            {"kind": kind, "applies": price_row(chosen) if chosen else None,
             "because": prices.describe_rank(chosen) if chosen else "no price",
             "others": [price_row(price) | {"why_not": why} for price, why in others]}
            for kind, chosen, others in found
        ])  # fmt: skip
        return
    for kind, chosen, others in found:
        if chosen is None:
            typer.echo(f"{kind}: free, there is no price")
        else:
            borrowed = f", the {chosen.kind} price" if chosen.kind != kind else ""
            typer.echo(f"{kind}: {format_price(chosen)} {chosen.currency} for {per(chosen.kind)}: "
                       f"{prices.describe_rank(chosen)}{borrowed}")  # fmt: skip
        for price, why in others:
            typer.echo(f"  not {format_price(price)} {price.currency} of {price.model} on "
                       f"{price.chip}: {why}")  # fmt: skip


@app.command("end")
def end(
    model: Model,
    kind: Annotated[str, typer.Option(help="input, cached, output, …")],
    chip: Chip = "*",
    at: At = "now",
    yes: Yes = False,
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """End a price without another one behind it."""
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import end_price

    confirm(f"End the {kind} price of {model} on {chip}?", yes)
    now = now_us()
    with transaction(database) as connection:
        ended = end_price(connection, model, chip, kind, at_us=_moment(at, now), now_us=now)
    _show([ended], as_json, "")


@app.command("export")
def export(
    style: Annotated[str, typer.Option("--format", help="toml, csv or json.")] = "toml",
    history: Annotated[bool, typer.Option("--history", help="Also what is over.")] = False,
    database: DatabaseUrl = "",
) -> None:
    """Print the price list, to be read by `mxn price import`."""
    from mxn.ledger.export import write_price_list
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import load_prices

    now = now_us()
    with reading(database) as connection:
        known = load_prices(connection)
    kept = [p for p in known if history or p.valid_to_us is None or p.valid_to_us > now]
    # An interval without a moment is the history of a price that was replaced before it began.
    kept = [p for p in kept if p.valid_to_us is None or p.valid_to_us > p.valid_from_us]
    typer.echo(write_price_list(kept, style), nl=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A list in TOML, CSV or JSON.")],
    yes: Yes = False,
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Set all prices of a list, or none if one of them cannot be."""
    from mxn.errors import NotFoundError
    from mxn.ledger.export import read_price_list
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import set_prices

    if not file.is_file():
        raise NotFoundError(f"no file {str(file)!r}")
    now = now_us()
    wanted = read_price_list(file.read_text(), file.suffix.lstrip(".") or "toml", now_us=now)
    confirm(f"Set {len(wanted)} prices?", yes)
    with transaction(database) as connection:
        added = set_prices(connection, wanted, now_us=now)
    _show(added, as_json, "all of them hold already")


def _moment(text: str, now_us: int) -> int:
    from mxn import env
    from mxn.ledger.moments import parse_moment, parse_zone

    return parse_moment(text, zone=parse_zone(env.get("MXN_TIME_ZONE")), now_us=now_us)


def _show(prices: list, as_json: bool, empty: str) -> None:
    from mxn.ledger.export import format_price, per, price_row
    from mxn.ledger.moments import format_us

    if as_json:
        print_json([price_row(price) for price in prices])
        return
    print_table(
        _HEAD,
        [(p.model, p.chip, p.kind, f"{format_price(p)} {p.currency}", per(p.kind),
          format_us(p.valid_from_us), format_us(p.valid_to_us)) for p in prices],
        numbers=("price",), empty=empty,
    )  # fmt: skip
