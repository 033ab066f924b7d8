"""A circuit breaker: after failures in a row nothing is sent for a while, then one probe.

closed → open after `open_after` failures in a row; open → half-open when its time is over, which
lets one request through; that one closes the breaker or opens it for twice as long. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    open_after: int = 3  # failures in a row
    open_s: float = 2.0  # the first time; doubles while probes fail
    max_open_s: float = 60.0


class Breaker:
    """State of one replica. A request that was let through ends with one of the three reports."""

    __slots__ = ("_failures", "_open_s", "_open_until_s", "_probe_is_out", "rules", "state")

    def __init__(self, rules: BreakerRules | None = None) -> None:
        self.rules = rules or BreakerRules()
        self.state: BreakerState = "closed"
        self._failures = 0
        self._open_s = self.rules.open_s
        self._open_until_s = 0.0
        self._probe_is_out = False

    def allows(self, now_s: float) -> bool:
        """Return whether a request may be sent now; changes nothing."""
        if self.state == "closed":
            return True
        return now_s >= self._open_until_s and not self._probe_is_out

    def sent(self, now_s: float) -> None:
        """A request that `allows` let through is on its way."""
        if self.state != "closed":
            self.state = "half_open"
            self._probe_is_out = True

    def succeeded(self) -> None:
        """The replica works: a first token or a whole result came."""
        self.state = "closed"
        self._failures = 0
        self._open_s = self.rules.open_s
        self._probe_is_out = False

    def failed(self, now_s: float) -> None:
        """The replica died, stalled or gave the request up."""
        self._failures += 1
        if self.state == "half_open":
            self._open_s = min(self.rules.max_open_s, 2 * self._open_s)
        elif self.state == "open" or self._failures < self.rules.open_after:
            return  # late news of a request from before it opened, or not enough of them
        self.state = "open"
        self._open_until_s = now_s + self._open_s
        self._probe_is_out = False

    def abandoned(self) -> None:
        """The request ended without a word about the replica, such as by its client leaving."""
        self._probe_is_out = False
