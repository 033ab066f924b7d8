"""The replicas behind one model: which are there, how they do, who may use them next.

Feeds the state machines of its seats with the clock and with what happens, and asks `routing` who
is to take a request. Knows no streams; those are in `call_stream.py`. Start at `Fleet.pick`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence

import msgspec

from mxn.engine.protocol import Encode, EngineClient, Generate, ModelInfo
from mxn.errors import ConfigError, UnsupportedError
from mxn.serve.routing.admission import Chips
from mxn.serve.routing.affinity import Affinity, chain
from mxn.serve.routing.policy import Choice, Load, choose
from mxn.serve.seat import Clock, PoolRules, Replica, Seat

__all__ = ["Clock", "Fleet", "PoolRules", "Replica", "Seat", "named"]

log = logging.getLogger("mxn.serve")

_DOUBTS_A_FAILURE = 4  # requests in a row with an error, without a word on whose fault it is
_WEIGHTS_S = 0.25  # weights are at most this old


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
