"""Money as integers of a millionth of a currency unit (micro). Knows no prices and no SQL.

No float is involved anywhere: text becomes a Decimal, and a Decimal with more than six decimals is
refused instead of rounded. The only rounding of the ledger is that of the cost of one request
(`pricing.cost`).
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation, localcontext

from mxn.errors import ConfigError

MICRO = 1_000_000
MAX_MICRO = 2**63 - 1  # what a database integer holds: about 9.2e12 units

_AMOUNT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_EXACT_DIGITS = 60  # more than any amount has: the default of 28 would round a large one


def parse_decimal(text: str, *, decimals: int, what: str = "amount") -> int:
    """Return `text`, such as ``"10.50"``, as an integer of 10^-decimals.

    Raises: ConfigError for anything but plain digits, for more decimals than can be kept and for
    amounts that no database integer holds.
    """
    plain = text.strip()
    if not _AMOUNT.fullmatch(plain) or not plain.isascii():
        raise ConfigError(f"{what} must be a plain number such as 10.50, got {text!r}")
    try:
        with localcontext(prec=_EXACT_DIGITS):
            scaled = Decimal(plain).scaleb(decimals)
            if scaled != scaled.to_integral_value():
                raise ConfigError(f"{what} {text!r} has more than {decimals} decimals")
    except InvalidOperation:
        raise ConfigError(f"{what} {text[:40]!r} has too many digits") from None
    if abs(scaled) > MAX_MICRO:
        raise ConfigError(f"{what} {text!r} is too large; the limit is {MAX_MICRO // MICRO}")
    return int(scaled)


def parse_money(text: str, *, what: str = "amount") -> int:
    """Return `text`, such as ``"10.50"``, in micro-units. Raises: ConfigError."""
    return parse_decimal(text, decimals=6, what=what)


def format_decimal(value: int, *, decimals: int = 6, at_least: int = 2) -> str:
    """Return an integer of 10^-decimals exactly, with `at_least` decimals: ``10.50``."""
    digits = str(abs(value)).rjust(decimals + 1, "0")
    whole, part = digits[:-decimals], digits[-decimals:]
    part = part[:at_least] + part[at_least:].rstrip("0")
    return f"{'-' if value < 0 else ''}{whole}.{part}"


def format_money(micro: int, currency: str = "") -> str:
    """Return micro-units exactly, with two to six decimals: ``10.50 USD``, ``0.000137``."""
    text = format_decimal(micro)
    return f"{text} {currency}" if currency else text


def check_currency(text: str) -> str:
    """Return a currency code in capitals. Raises: ConfigError unless it has three letters."""
    code = text.strip().upper()
    if not re.fullmatch(r"[A-Z]{3}", code):
        raise ConfigError(f"a currency is three letters such as USD, EUR or CNY, got {text!r}")
    return code
