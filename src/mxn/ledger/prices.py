"""The price list: rows are added and closed, never changed. Functions on a connection.

Of one model, chip and kind, at most one price holds at any time: a new price closes the one before
it at its own start, and ends where the next known one starts. A price of the past stays as it is.
A scheduled price that is replaced before it began keeps an empty interval as its history.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import Connection, false, insert, select, text, update

from mxn.errors import ConfigError, NotFoundError
from mxn.ledger import pricing, schema
from mxn.ledger.moments import iso
from mxn.ledger.money import MAX_MICRO, check_currency
from mxn.ledger.pricing import ANY, KINDS, Price
from mxn.ledger.tenants import new_id


class NewPrice(msgspec.Struct, frozen=True, kw_only=True):
    """A price to set: micro-units for a million of its kind (`pricing.UNITS`), from a time on."""

    model: str
    chip: str
    kind: str
    micro_per_million: int
    currency: str
    valid_from_us: int
    valid_to_us: int | None = None


def load_prices(connection: Connection) -> list[Price]:
    """Return every price there ever was, by model, chip, kind and start."""
    table = schema.prices
    query = select(table).order_by(
        table.c.model, table.c.chip, table.c.kind, table.c.valid_from_us, table.c.created_us
    )
    return [_price(row) for row in connection.execute(query)]


def set_prices(connection: Connection, wanted: Iterable[NewPrice], *, now_us: int) -> list[Price]:
    """Set prices, all or none, and return those that are new: one that holds already is left out.

    The currency of all prices that can meet in one request must be the same.
    Raises: ConfigError for a price that cannot be, or that would change the past.
    """
    lock(connection)
    added = [price for one in wanted if (price := _set(connection, one, now_us)) is not None]
    _check_currencies(load_prices(connection))
    return added


def end_price(
    connection: Connection, model: str, chip: str, kind: str, *, at_us: int, now_us: int
) -> Price:
    """Close the price that holds at a time, from then on without a price, and return it.

    Raises: ConfigError for a time that is over, NotFoundError where no price holds then.
    """
    lock(connection)
    if at_us < now_us:
        raise ConfigError(f"a price cannot end in the past: {iso(at_us)}")
    for price in _line(connection, model, chip, kind):
        if price.holds_at(at_us):
            _close(connection, price, at_us)
            return price
    raise NotFoundError(
        f"no {kind} price for model {model!r} and chip {chip!r} holds at {iso(at_us)}",
        hint="`mxn price list` shows those that do",
    )


def explain(
    prices: Iterable[Price], model: str, chip: str, at_us: int
) -> list[tuple[pricing.PriceKind, Price | None, list[tuple[Price, str]]]]:
    """Return for each kind the price that applies and why each other candidate does not."""
    known = [price for price in prices if price.rank(model, chip) is not None]
    found = []
    for kind in KINDS:
        chosen = pricing.choose(known, model, chip, kind, at_us)
        related = (kind, pricing.FALLBACK.get(kind))
        others = [
            (price, _why_not(price, chosen, kind, at_us))
            for price in known
            if price.kind in related and price != chosen
        ]
        found.append((kind, chosen, others))
    return found


def describe_rank(price: Price) -> str:
    """Return how specific a price is, in words."""
    model = "any model" if price.model == ANY else "this model"
    return f"{model} on {'any chip' if price.chip == ANY else 'this chip'}"


def lock(connection: Connection) -> None:
    """Let one process at a time change the price list, until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE prices IN SHARE ROW EXCLUSIVE MODE"))
    else:  # a write, even of no row, takes SQLite's one write lock
        table = schema.prices
        connection.execute(update(table).where(false()).values(currency=table.c.currency))


def _set(connection: Connection, wanted: NewPrice, now_us: int) -> Price | None:
    new = _checked(wanted)
    line = _line(connection, new.model, new.chip, new.kind)
    holding = next((price for price in line if price.holds_at(new.valid_from_us)), None)
    later = [price for price in line if price.valid_from_us > new.valid_from_us]
    ends_us = _earliest(new.valid_to_us, *(price.valid_from_us for price in later if not _empty(
        price)))  # fmt: skip
    if holding is not None and _says_the_same(holding, new, ends_us):
        return None
    is_past = new.valid_from_us < now_us
    if is_past and (holding is not None or any(p.valid_from_us < now_us for p in later)):
        raise ConfigError(
            f"the {new.kind} price of {new.model} on {new.chip} cannot start at "
            f"{iso(new.valid_from_us)}: the past has a price already",
            hint="let it start now or later",
        )
    if holding is not None:
        _close(connection, holding, new.valid_from_us)
    row = {name: getattr(new, name) for name in NewPrice.__struct_fields__} | {
        "id": new_id("price"), "valid_to_us": ends_us, "created_us": now_us,
    }  # fmt: skip
    connection.execute(insert(schema.prices).values(**row))
    del row["created_us"]
    return Price(**row)


def _checked(new: NewPrice) -> NewPrice:
    if new.kind not in KINDS:
        raise ConfigError(f"a price is for one of {', '.join(KINDS)}, got {new.kind!r}")
    if not 0 <= new.micro_per_million <= MAX_MICRO:
        raise ConfigError(f"a price must be from 0 to {MAX_MICRO}, got {new.micro_per_million}")
    for what, name in (("model", new.model), ("chip", new.chip)):
        if not name or name != name.strip() or (ANY in name and name != ANY):
            raise ConfigError(f"{what} of a price must be a name or *, got {name!r}")
    if new.valid_to_us is not None and new.valid_to_us <= new.valid_from_us:
        raise ConfigError(f"a price from {iso(new.valid_from_us)} cannot end at "
                          f"{iso(new.valid_to_us)}")  # fmt: skip
    return msgspec.structs.replace(new, currency=check_currency(new.currency))


def _says_the_same(holding: Price, new: NewPrice, ends_us: int | None) -> bool:
    return (
        holding.micro_per_million == new.micro_per_million
        and holding.currency == new.currency
        and holding.valid_to_us == ends_us
    )


def _line(connection: Connection, model: str, chip: str, kind: str) -> list[Price]:
    table = schema.prices
    query = select(table).where(
        table.c.model == model, table.c.chip == chip, table.c.kind == kind
    ).order_by(table.c.valid_from_us)  # fmt: skip
    return [_price(row) for row in connection.execute(query)]


def _close(connection: Connection, price: Price, at_us: int) -> None:
    table = schema.prices
    connection.execute(update(table).where(table.c.id == price.id).values(valid_to_us=at_us))


def _check_currencies(prices: list[Price]) -> None:
    alive = [price for price in prices if not _empty(price)]
    if len({price.currency for price in alive}) < 2:
        return
    for index, one in enumerate(alive):
        for other in alive[index + 1 :]:
            if one.currency != other.currency and _can_meet(one, other):
                raise ConfigError(
                    f"a request could cost {one.currency} by the {one.kind} price of {one.model} "
                    f"on {one.chip} and {other.currency} by the {other.kind} price of "
                    f"{other.model} on {other.chip}",
                    hint="set all prices that meet in one currency, with `mxn price import`",
                )


def _can_meet(one: Price, other: Price) -> bool:
    if ANY not in (one.model, other.model) and one.model != other.model:
        return False
    if ANY not in (one.chip, other.chip) and one.chip != other.chip:
        return False
    starts_us = max(one.valid_from_us, other.valid_from_us)
    ends_us = _earliest(one.valid_to_us, other.valid_to_us)
    return ends_us is None or starts_us < ends_us


def _why_not(price: Price, chosen: Price | None, kind: str, at_us: int) -> str:
    if price.valid_from_us > at_us:
        return f"starts at {iso(price.valid_from_us)}"
    if not price.holds_at(at_us):
        return f"ended at {iso(price.valid_to_us)}"
    if price.kind != kind:
        return f"only where {kind} has no price of its own"
    assert chosen is not None  # this one holds, so there is a best one
    return f"less specific: {describe_rank(price)}"


def _earliest(*times_us: int | None) -> int | None:
    return min((at_us for at_us in times_us if at_us is not None), default=None)


def _empty(price: Price) -> bool:
    return price.valid_to_us is not None and price.valid_to_us <= price.valid_from_us


def _price(row: Any) -> Price:
    return Price(**{name: getattr(row, name) for name in Price.__struct_fields__})
