"""The replicas behind one model: which are there, how they do, who may use them next.

Holds the pure state machines of `routing` and feeds them with the clock and with what happens.
Knows no streams; those are in `pooled.py`. Start at `Fleet.pick`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from mxn.engine.protocol import Encode, EngineClient, EngineStats, Generate, ModelInfo
from mxn.errors import ConfigError, UnsupportedError
from mxn.serve.routing.admission import AdmissionRules, Chips
from mxn.serve.routing.affinity import Affinity, chain
from mxn.serve.routing.breaker import Breaker, BreakerRules
from mxn.serve.routing.health import Health, HealthRules
from mxn.serve.routing.policy import Choice, Load, PolicyRules, choose
from mxn.serve.routing.speed import Speed

log = logging.getLogger("mxn.serve")

Clock = Callable[[], float]

_RECENT_S = 10.0  # traffic fades like this when shares are compared
_DOUBTS_A_FAILURE = 4  # requests in a row with an error, without a word on whose fault it is
_WEIGHTS_S = 0.25  # weights are at most this old


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


class Fleet:
    """The seats of a pool, in the order in which they were added."""

    def __init__(self, rules: PoolRules, clock: Clock = time.monotonic) -> None:
        self.rules = rules
        self.clock = clock
        self.affinity = Affinity()
        self.adapters: dict[str, int] = {}  # name → version that every replica should have
        self._seats: dict[str, Seat] = {}
        self._weights_at_s = float("-inf")

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def __len__(self) -> int:
        return len(self._seats)

    def get(self, replica_id: str) -> Seat | None:
        return self._seats.get(replica_id)

    def add(self, replica: Replica) -> Seat:
        """Raises: ConfigError for an id in use, or a model that is not the one of the others."""
        if replica.id in self._seats:
            raise ConfigError(f"two replicas are named {replica.id!r}")
        for seat in self:
            _check_alike(seat.replica, replica)
        seat = self._seats[replica.id] = Seat(replica, self.rules)
        self._weights_at_s = float("-inf")
        return seat

    def drop(self, seat: Seat) -> None:
        self._seats.pop(seat.id, None)
        self.affinity.forget(seat.id)

    def info(self, chips: Chips = None) -> ModelInfo:
        """Return what all replicas together can do. Raises: ConfigError when there are none."""
        infos = [seat.replica.client.info for seat in self.of(chips)]
        if not infos:
            raise ConfigError("the pool has no replicas" + (f" on {named(chips)}" if chips else ""))
        if len(infos) == 1:
            return infos[0]
        return _merged(infos, [seat.replica for seat in self.of(chips)])

    def of(self, chips: Chips) -> list[Seat]:
        """Return the seats on some chips; None: all."""
        return [seat for seat in self if chips is None or seat.replica.chip in chips]

    def barred(
        self, chips: Chips, request: Generate | Encode, *, resumes: bool = False
    ) -> tuple[str, ...]:
        """Return the ids of the replicas that lack what a request asks for.

        `resumes`: it comes with tokens made elsewhere. Raises: UnsupportedError when all lack it.
        """
        seats = self.of(chips)
        reasons = {seat.id: _lacking(seat.replica.client, request, resumes) for seat in seats}
        barred = tuple(name for name, reason in reasons.items() if reason is not None)
        if barred and len(barred) == len(seats):
            raise UnsupportedError(
                f"no replica of this model can do it: {reasons[barred[0]]}", hint="leave it out"
            )
        return barred

    def chips(self) -> list[str]:
        """Return the chips of the replicas, each once."""
        return list(dict.fromkeys(seat.replica.chip for seat in self))

    def states(self, chips: Chips = None) -> str:
        """Return one line on why each replica is or is not used, for errors."""
        now_s = self.clock()
        return ", ".join(f"{seat.id} {seat.state(now_s)}" for seat in self.of(chips)) or "none"

    def has_room(self, chips: Chips, excluded: Sequence[str] = ()) -> bool:
        """Whether a request could run now."""
        return any(
            seat.in_flight < seat.replica.max_in_flight
            for seat in self._candidates(chips, excluded, self.clock())
        )

    def has_other(self, chips: Chips, excluded: Collection[str]) -> bool:
        """Whether there is a replica, in whatever state, that is not excluded."""
        return any(seat.id not in excluded for seat in self.of(chips))

    def has_any(self, chips: Chips, excluded: Sequence[str] = ()) -> bool:
        """Whether there is a replica for it, full or not."""
        return bool(self._candidates(chips, excluded, self.clock()))

    def is_held_back(self, chips: Chips, excluded: Sequence[str] = ()) -> bool:
        """Whether a replica answers, so that there is hope, also where `has_any` is False."""
        return any(
            not seat.is_draining and seat.replica.client.is_healthy
            for seat in self.of(chips)
            if seat.id not in excluded
        )

    def pick(
        self,
        prompt_ids: Sequence[int],
        *,
        chips: Chips = None,
        excluded: Sequence[str] = (),
        adapter: str | None = None,
        beside: str = "",
        ignores_room: bool = False,
    ) -> tuple[Seat, Choice] | None:
        """Return the seat for a request, which is now in flight there; None: there is none.

        `beside` is the chip it should be on if there is room: a request that is on one chip with
        all its choices, and stays there when a replica is lost, has one price.
        `ignores_room`: a stream that has begun must not wait behind those that have not.
        """
        now_s = self.clock()
        seats = self._candidates(chips, excluded, now_s)
        if not ignores_room:
            seats = [seat for seat in seats if seat.in_flight < seat.replica.max_in_flight]
        if not seats:
            return None
        if beside:
            seats = [seat for seat in seats if seat.replica.chip == beside] or seats
        seats = self._with_adapter(seats, adapter)
        hashes = chain(prompt_ids, adapter) if len(self._seats) > 1 else []
        if len(seats) == 1:
            choice = Choice(seats[0].id, "only replica")
        else:
            self._weigh(now_s)
            matched = self.affinity.match(hashes)
            loads = [_load_of(seat, matched.get(seat.id, 0), now_s) for seat in seats]
            choice = choose(loads, len(prompt_ids), self.rules.policy)
        seat = self._seats[choice.replica]
        self.affinity.note(hashes, seat.id)
        seat.took_one(now_s)
        seat.breaker.sent(now_s)
        return seat, choice

    def release(self, seat: Seat) -> None:
        seat.in_flight -= 1

    def worked(self, seat: Seat) -> None:
        """A first token or a whole result came."""
        seat.num_doubts = 0
        seat.breaker.succeeded()
        if seat.health.is_up:
            seat.health.good(self.clock())

    def failed(self, seat: Seat, why: str) -> None:
        """The replica died, stalled or gave a request up."""
        seat.breaker.failed(self.clock())
        self.failed_probe(seat, why)

    def doubted(self, seat: Seat, why: str) -> None:
        """The replica answered a request with an error: one or the other is broken.

        A request that breaks everywhere must shut out nobody; a replica to which every request
        does is to be noticed.
        """
        seat.num_doubts += 1
        if seat.num_doubts % _DOUBTS_A_FAILURE == 0:
            self.failed(seat, why)
        else:
            seat.breaker.abandoned()

    def failed_probe(self, seat: Seat, why: str) -> None:
        """The replica did not answer, or says that it is down."""
        now_s = self.clock()
        is_dead = not seat.replica.client.is_healthy
        if seat.health.bad(now_s, is_fatal=is_dead):
            log.warning("replica %s is out: %s", seat.id, why)
            if is_dead:
                self.affinity.forget(seat.id)

    def _candidates(self, chips: Chips, excluded: Sequence[str], now_s: float) -> list[Seat]:
        seats = [seat for seat in self.of(chips) if seat.id not in excluded]
        usable = [seat for seat in seats if seat.is_usable(now_s)]
        return usable or [seat for seat in seats if seat.is_last_resort(now_s)]

    def _with_adapter(self, seats: list[Seat], name: str | None) -> list[Seat]:
        """Return the seats that have an adapter, or all: one that lacks it can load it first."""
        version = None if name is None else self.adapters.get(name)
        if name is None or version is None:
            return seats
        return [seat for seat in seats if seat.adapters.get(name) == version] or seats

    def _weigh(self, now_s: float) -> None:
        """Set each seat's weight to its capacity at the mean load; unknown ones get the mean."""
        if now_s - self._weights_at_s < _WEIGHTS_S:
            return
        self._weights_at_s = now_s
        loads = [seat.speed.mean_load for seat in self]
        known = [load for load in loads if load is not None]
        at_load = max(1.0, sum(known) / len(known)) if known else 1.0
        capacities = {seat.id: seat.speed.capacity(at_load) for seat in self}
        measured = [value for value in capacities.values() if value]
        mean = sum(measured) / len(measured) if measured else 1.0
        for seat in self:
            seat.weight = capacities[seat.id] or mean


def _lacking(client: EngineClient, request: Generate | Encode, resumes: bool) -> str | None:
    """Return why a replica cannot take a request; those of our own engine say nothing of it."""
    lacks = getattr(client, "lacks", None)
    return None if lacks is None else lacks(request, resumes=resumes)


def named(chips: Chips) -> str:
    """Return chips for people."""
    return " or ".join(sorted(chips or ()))


def _load_of(seat: Seat, matched_tokens: int, now_s: float) -> Load:
    return Load(
        replica=seat.id,
        weight=seat.weight,
        in_flight=seat.load,
        waiting=seat.waiting,
        share=seat.recent(now_s),
        kv_used=seat.kv_used,
        matched_tokens=matched_tokens,
        first_token_s=seat.speed.first_token_s,
        cost=seat.replica.cost,
    )


def _check_alike(one: Replica, other: Replica) -> None:
    """Refuse a replica that could not go on with another's tokens. Raises: ConfigError."""
    a, b = one.client.info, other.client.info
    for name in ("kind", "vocab_size", "eos_ids"):
        if getattr(a, name) != getattr(b, name):
            raise ConfigError(
                f"replica {other.id!r} has {name} {getattr(b, name)!r}, "
                f"replica {one.id!r} has {getattr(a, name)!r}",
                hint="replicas of one name run the same model",
            )


def _merged(infos: list[ModelInfo], replicas: list[Replica]) -> ModelInfo:
    return msgspec.structs.replace(
        infos[0],
        device=",".join(dict.fromkeys(replica.device for replica in replicas)),
        chip=",".join(dict.fromkeys(replica.chip for replica in replicas)),
        dtype=",".join(dict.fromkeys(info.dtype for info in infos)),
        max_context=min(info.max_context for info in infos),
        kv_pages_total=sum(info.kv_pages_total for info in infos),
        native=all(info.native for info in infos),
        load_s=max(info.load_s for info in infos),
    )
