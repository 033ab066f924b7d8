"""Times as people write them: dates, durations, days and months in a time zone. Pure but `now_us`.

Times are integer µs of Unix time; an interval holds its start and not its end. Knows no SQL.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, date, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

from mxn.errors import ConfigError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE_US = timedelta(microseconds=1)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
MAX_US = (datetime(9999, 1, 1, tzinfo=UTC) - _EPOCH) // _ONE_US


def now_us() -> int:
    return time.time_ns() // 1000


def parse_zone(name: str) -> tzinfo:
    """Return a time zone by its IANA name, such as ``Europe/Berlin``. Raises: ConfigError."""
    if name.upper() in ("UTC", "Z"):
        return UTC  # needs no time zone database, which small containers lack
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(
            f"unknown time zone {name!r}",
            hint="use an IANA name such as UTC, Asia/Shanghai or Europe/Berlin",
        ) from None


def to_us(moment: datetime) -> int:
    return (moment - _EPOCH) // _ONE_US


def to_datetime(at_us: int, zone: tzinfo = UTC) -> datetime:
    return (_EPOCH + at_us * _ONE_US).astimezone(zone)


def format_us(at_us: int | None, zone: tzinfo = UTC) -> str:
    """Return a time for people, to the second: ``2026-11-21 06:41:04``; "" for None."""
    return "" if at_us is None else f"{to_datetime(at_us, zone):%Y-%m-%d %H:%M:%S}"


def iso(at_us: int | None) -> str | None:
    """Return a time for programs, in UTC and to the microsecond."""
    return None if at_us is None else to_datetime(at_us).isoformat(timespec="microseconds")


def parse_duration(text: str) -> int:
    """Return a duration such as ``90s``, ``1h``, ``30d`` in µs. Raises: ConfigError."""
    match = re.fullmatch(r"(\d{1,9})([smhdwy])", text.strip().lower())
    if not match:
        raise ConfigError(f"cannot read {text!r} as a duration; examples: 90s, 15m, 1h, 30d, 1y")
    return int(match[1]) * _UNITS_S[match[2]] * 1_000_000


def parse_moment(text: str, *, zone: tzinfo, now_us: int) -> int:
    """Return the time meant by ``2026-11-01``, ``2026-11-01T12:30``, ``now`` or ``7d`` (ago).

    A date is its midnight in `zone`; a time without an offset is in `zone`. Raises: ConfigError.
    """
    plain = text.strip()
    if plain == "now":
        return now_us
    if re.fullmatch(r"\d{1,9}[smhdwy]", plain.lower()):
        return max(0, now_us - parse_duration(plain))
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", plain):
            plain += "T00:00"
        moment = datetime.fromisoformat(plain)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
        at_us = to_us(moment)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"cannot read {text!r} as a time; examples: 2026-11-01, 2026-11-01T12:30, now, 7d (ago)"
        ) from None
    if not 0 <= at_us <= MAX_US:
        raise ConfigError(f"cannot read {text!r} as a time from 1970 to 9998")
    return at_us


def day_of(at_us: int, zone: tzinfo) -> str:
    """Return the day of a time in a time zone, as ``2026-11-01``."""
    return to_datetime(at_us, zone).date().isoformat()


def day_start_us(day: str, zone: tzinfo) -> int:
    """Return the first µs of a day in a time zone."""
    found = date.fromisoformat(day)
    return to_us(datetime(found.year, found.month, found.day, tzinfo=zone))


def next_day(day: str) -> str:
    return (date.fromisoformat(day) + timedelta(days=1)).isoformat()


def month_bounds_us(month: str, zone: tzinfo) -> tuple[int, int]:
    """Return start and end of a month such as ``2026-11`` in a time zone. Raises: ConfigError."""
    match = re.fullmatch(r"(\d{4})-(\d{2})", month.strip())
    if not match or not 1 <= int(match[2]) <= 12 or not 1970 <= int(match[1]) < 9999:
        raise ConfigError(f"a month is written like 2026-11, got {month!r}")
    year, number = int(match[1]), int(match[2])
    after = (year + number // 12, number % 12 + 1)
    return (
        to_us(datetime(year, number, 1, tzinfo=zone)),
        to_us(datetime(*after, 1, tzinfo=zone)),
    )
