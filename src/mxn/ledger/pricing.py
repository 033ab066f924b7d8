"""Which price applies, and what a request costs. Pure: knows no SQL and no clock.

Start at `choose` and `cost`. A price is for a model or ``*``, a chip or ``*``, and one kind; the
most specific wins: model and chip, then model, then chip, then neither. A model that has none of
its own, such as an adapter, is priced like its base before ``*`` counts. A price holds from
`valid_from_us` up to, not including, `valid_to_us`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import msgspec

from mxn.errors import ConfigError
from mxn.ledger.bounds import MAX_COST_MICRO

PriceKind = Literal["input", "cached", "output", "reasoning", "request", "device_second"]
KINDS: tuple[PriceKind, ...] = get_args(PriceKind)
ANY = "*"

# A price is micro-units for a million of these. A million device microseconds are a device-second.
UNITS: Mapping[PriceKind, str] = {
    "input": "token",
    "cached": "token",
    "output": "token",
    "reasoning": "token",
    "request": "request",
    "device_second": "device microsecond",
}

# Cached tokens are input tokens and reasoning tokens are output tokens where they have no price.
FALLBACK: Mapping[PriceKind, PriceKind] = {"cached": "input", "reasoning": "output"}

_PER = 1_000_000


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `prices`. Times are µs of Unix time; `valid_to_us` None: until further notice."""

    id: str
    model: str = ANY
    chip: str = ANY
    kind: PriceKind
    micro_per_million: int
    currency: str
    valid_from_us: int = 0
    valid_to_us: int | None = None

    def holds_at(self, at_us: int) -> bool:
        """Say whether the price is in force at a time; an empty interval never is."""
        return self.valid_from_us <= at_us and (
            self.valid_to_us is None or at_us < self.valid_to_us
        )

    def rank(self, model: str, chip: str, base: str = "") -> int | None:
        """Return how specifically it is for a model on a chip; None: it is not.

        5 model and chip, 4 model, 3 base and chip, 2 base, 1 chip, 0 neither.
        """
        if self.chip not in (ANY, chip):
            return None
        names = (ANY, base or model, model)  # the last one that fits counts
        places = [place for place, name in enumerate(names) if name == self.model]
        return 2 * places[-1] + (self.chip != ANY) if places else None


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What a usage row keeps of a price, so that its cost can be computed again."""

    kind: PriceKind
    price_id: str
    micro_per_million: int
    currency: str


def choose(
    prices: Iterable[Price], model: str, chip: str, kind: PriceKind, at_us: int, *, base: str = ""
) -> Price | None:
    """Return the price that applies, or None where there is none for this kind or its fallback.

    `base` is the model whose prices count where `model` has none. The kind goes before the place: a
    cached price for any model is taken before an input price for this model.
    """
    known = list(prices)
    for wanted in (kind, FALLBACK.get(kind)):
        found = [
            ((rank, price.valid_from_us, price.id), price)
            for price in known
            if price.kind == wanted
            and price.holds_at(at_us)
            and (rank := price.rank(model, chip, base)) is not None
        ]
        if found:
            return max(found, key=lambda item: item[0])[1]
    return None


def choose_all(
    prices: Iterable[Price], model: str, chip: str, at_us: int, *, base: str = ""
) -> dict[PriceKind, Applied]:
    """Return the price of each kind that has one, as it is kept in a usage row."""
    known = list(prices)
    applied: dict[PriceKind, Applied] = {}
    for kind in KINDS:
        price = choose(known, model, chip, kind, at_us, base=base)
        if price is not None:
            applied[kind] = Applied(
                kind=kind,
                price_id=price.id,
                micro_per_million=price.micro_per_million,
                currency=price.currency,
            )
    return applied


def quantities(
    *,
    input_tokens: int = 0,
    cached_tokens: int = 0,
    output_tokens: int = 0,
    reasoning_tokens: int = 0,
    device_us: int = 0,
    requests: int = 1,
) -> dict[PriceKind, int]:
    """Return what is billed of each kind; cached and reasoning tokens are counted once only."""
    return {
        "input": input_tokens - cached_tokens,
        "cached": cached_tokens,
        "output": output_tokens - reasoning_tokens,
        "reasoning": reasoning_tokens,
        "request": requests,
        "device_second": device_us,
    }


def cost(amounts: Mapping[PriceKind, int], applied: Mapping[PriceKind, Applied]) -> int:
    """Return the cost in micro-units: the exact sum over all kinds, rounded once, half up;
    never more than MAX_COST_MICRO, which a row must hold.

    Kinds without a price are free. Raises: ConfigError when the prices differ in currency.
    """
    currency_of(applied)
    exact = sum(
        amount * applied[kind].micro_per_million
        for kind, amount in amounts.items()
        if kind in applied
    )
    return min(MAX_COST_MICRO, round_half_up(exact))


def round_half_up(exact: int, per: int = _PER) -> int:
    """Return ``exact / per`` as the nearest integer; a half goes up."""
    return (2 * exact + per) // (2 * per)


def currency_of(applied: Mapping[PriceKind, Applied]) -> str:
    """Return the one currency of some prices, "" if there are none. Raises: ConfigError."""
    currencies = sorted({price.currency for price in applied.values()})
    if len(currencies) > 1:
        raise ConfigError(f"the prices of one request are in {' and '.join(currencies)}")
    return currencies[0] if currencies else ""


def encode_applied(applied: Mapping[PriceKind, Applied]) -> str:
    """Return the JSON text of `usage.prices`: equal prices give equal text, so rows can be grouped.

    ``{"input": ["price_…", 500000, "USD"], …}``
    """
    rows = {
        kind: [applied[kind].price_id, applied[kind].micro_per_million, applied[kind].currency]
        for kind in KINDS
        if kind in applied
    }
    return msgspec.json.encode(rows).decode()


def decode_applied(text: str | None) -> dict[PriceKind, Applied]:
    """Return what `encode_applied` wrote; no text: no prices."""
    rows = msgspec.json.decode(text or "{}", type=dict[PriceKind, tuple[str, int, str]])
    return {
        kind: Applied(kind=kind, price_id=row[0], micro_per_million=row[1], currency=row[2])
        for kind, row in rows.items()
    }
