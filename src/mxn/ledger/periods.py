"""When the day or month of a budget began, in a time zone. Knows no SQL."""

from __future__ import annotations

from datetime import UTC, tzinfo

from mxn.ledger.moments import day_of, day_start_us, month_bounds_us, next_day


class Periods:
    """Computed once a day, since it is asked for by each request."""

    def __init__(self, zone: tzinfo = UTC) -> None:
        self._zone = zone
        self._from_us = self._until_us = 0
        self._starts: dict[str, int] = {}

    def start(self, period: str, at_us: int) -> int:
        """Return the first µs of the ``day`` or ``month`` of a time; 0 for ``total``."""
        if not self._from_us <= at_us < self._until_us:
            self._compute(at_us)
        return self._starts[period]

    def _compute(self, at_us: int) -> None:
        day = day_of(at_us, self._zone)
        self._from_us = day_start_us(day, self._zone)
        self._until_us = day_start_us(next_day(day), self._zone)
        month_us, _ = month_bounds_us(day[:7], self._zone)
        self._starts = {"total": 0, "day": self._from_us, "month": month_us}
