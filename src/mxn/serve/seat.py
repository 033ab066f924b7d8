"""One replica in a pool: its limits, what is known of it, and whether it may be used.

Holds the pure state machines of `routing` for one replica. Knows nothing of the other replicas and
of who asks; those are in `fleet.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mxn.engine.protocol import EngineClient, EngineStats
from mxn.serve.routing.admission import AdmissionRules
from mxn.serve.routing.breaker import Breaker, BreakerRules
from mxn.serve.routing.health import Health, HealthRules
from mxn.serve.routing.policy import PolicyRules
from mxn.serve.routing.speed import Speed

Clock = Callable[[], float]

_RECENT_S = 10.0  # traffic fades like this when shares are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """Limits of a pool. A replica stalls when it is silent for longer than `k_gap` usual gaps and
    a floor; before the first token, that is times its usual wait for one."""

    stall_floor_s: float = 15.0
    first_token_floor_s: float = 60.0
    k_gap: float = 20.0
    # Where no other replica could go on, waiting is better than giving up, up to so many limits.
    last_hope: float = 4.0
    max_attempts: int = 4  # of one request, on all replicas together
    # A stream that has begun waits this long for a replica to come back; one that has not, for a
    # replica that is there and only held back for its failures.
    recover_s: float = 10.0
    probe_s: float = 1.0  # between two looks at a replica, ± a fifth
    probe_limit_s: float = 2.0
    policy: PolicyRules = field(default_factory=PolicyRules)
    health: HealthRules = field(default_factory=HealthRules)
    breaker: BreakerRules = field(default_factory=BreakerRules)
    admission: AdmissionRules = field(default_factory=AdmissionRules)


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """One running copy of a model. Empty `chip` and `device`: what its client says."""

    id: str
    client: EngineClient
    chip: str = ""
    device: str = ""
    cost: float | None = None  # per token, in any unit that all replicas share
    max_in_flight: int = 64

    def __post_init__(self) -> None:
        self.chip = self.chip or self.client.info.chip
        self.device = self.device or self.client.info.device


class Seat:
    """A replica in the pool, with what is known of it."""

    def __init__(self, replica: Replica, rules: PoolRules) -> None:
        self.replica = replica
        self.health = Health(rules.health)
        self.breaker = Breaker(rules.breaker)
        self.speed = Speed()
        self.in_flight = 0
        self.others = 0  # requests that are not ours, at the last look
        self.waiting = 0
        self.kv_used = 0.0
        self.is_draining = False
        self.num_tokens = 0  # made here, for whatever request
        self.num_lost = 0  # requests that had to go on from another one
        self.num_doubts = 0  # requests in a row that it answered with an error, while it lives
        self.weight = 1.0
        self.adapters: dict[str, int] = {}  # name → version that it has loaded; 0: not known
        self._recent, self._recent_at_s = 0.0, 0.0

    @property
    def id(self) -> str:
        return self.replica.id

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    def recent(self, now_s: float) -> float:
        """Return the requests it lately got, older ones counting less."""
        return self._recent * math.exp((self._recent_at_s - now_s) / _RECENT_S)

    def took_one(self, now_s: float) -> None:
        self._recent = self.recent(now_s) + 1.0
        self._recent_at_s = now_s
        self.in_flight += 1

    def is_usable(self, now_s: float) -> bool:
        return (
            not self.is_draining
            and self.replica.client.is_healthy
            and self.health.is_up
            and self.breaker.allows(now_s)
        )

    def is_last_resort(self, now_s: float) -> bool:
        """Whether it answers and is only held down for having flapped."""
        is_there = not self.is_draining and self.replica.client.is_healthy
        return is_there and self.breaker.allows(now_s)

    def state(self, now_s: float) -> str:
        """Return a word or two on whether it takes requests."""
        if self.is_draining:
            return "drains"
        if not self.replica.client.is_healthy:
            return "is down"
        if not self.breaker.allows(now_s):
            return "failed too often"
        if not self.health.is_up:
            return f"held down for {max(0.0, self.health.held_until_s - now_s):.1f} s more"
        return "is up"

    def see(self, stats: EngineStats) -> None:
        """Take over what the replica says of itself."""
        self.others = max(0, stats.num_running + stats.num_waiting - self.in_flight)
        self.waiting = stats.num_waiting
        total = stats.kv_pages_total
        self.kv_used = stats.kv_pages_used / total if total else 0.0
