"""Whether a replica counts as up, with flap damping. Knows results and times, nothing of replicas.

Several results in a row change the state. Each fall counts as a flap; the next rise waits for a
hold-down that doubles with every flap, and flaps are forgotten with a half-life. Start at `Health`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DOUBLINGS = 30  # so that 2 ** flaps stays a small number


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRules:
    """How many results in a row change the state, and how long a replica that flaps stays out."""

    down_after: int = 2  # bad results in a row
    up_after: int = 2  # good results in a row
    hold_s: float = 1.0  # hold-down after the first fall; doubles with each flap
    max_hold_s: float = 60.0
    half_life_s: float = 120.0  # of the flap count


class Health:
    """State of one replica. Times are seconds of any monotonic clock and never go back."""

    __slots__ = ("_bad", "_flaps", "_flaps_at_s", "_good", "_is_up", "held_until_s", "rules")

    def __init__(self, rules: HealthRules | None = None) -> None:
        self.rules = rules or HealthRules()
        self.held_until_s = float("-inf")
        self._is_up = True
        self._good = self._bad = 0
        self._flaps, self._flaps_at_s = 0.0, 0.0

    @property
    def is_up(self) -> bool:
        return self._is_up

    def flaps(self, now_s: float) -> float:
        """Return the count of falls, older ones counting less."""
        age_s = max(0.0, now_s - self._flaps_at_s)
        return self._flaps * 0.5 ** (age_s / self.rules.half_life_s)

    def good(self, now_s: float) -> bool:
        """Note a good result; return whether it brought the replica up."""
        self._bad = 0
        if self._is_up:
            return False
        self._good += 1
        if self._good < self.rules.up_after or now_s < self.held_until_s:
            return False
        self._is_up = True
        return True

    def bad(self, now_s: float, *, is_fatal: bool = False) -> bool:
        """Note a bad result; return whether it took the replica down.

        `is_fatal`: the replica is known to be gone, so one result is enough.
        """
        self._good = 0
        self._bad += 1
        if not self._is_up or (self._bad < self.rules.down_after and not is_fatal):
            return False
        self._is_up = False
        self._flaps, self._flaps_at_s = self.flaps(now_s) + 1.0, now_s
        doubled = self.rules.hold_s * 2.0 ** min(self._flaps - 1.0, MAX_DOUBLINGS)
        self.held_until_s = now_s + min(self.rules.max_hold_s, doubled)
        return True
