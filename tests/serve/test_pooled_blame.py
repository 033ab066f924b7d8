"""Whose fault an error is: a request that fails everywhere shuts nobody out, a sick replica is."""

from __future__ import annotations

from typing import Any

import pytest

from mxn.engine.protocol import Delta, Encode
from mxn.errors import EngineDiedError, InternalError, UserError
from mxn.serve.fleet import Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.testing import Scripted
from serve.test_pooled import QUICK, WHOLE, ask, collect, pool_of, run


class Picky(Scripted):
    """Answers some requests with an error, and lives."""

    async def generate(self, request: Any) -> Any:
        if request.request_id.startswith("bad"):
            self.seen.append(request)
            raise InternalError("it broke")
        async for delta in super().generate(request):
            yield delta


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def states(pool: PooledClient) -> list[str]:
    fleet = pool._core.fleet
    return [seat.state(fleet.clock()) for seat in fleet]


async def errors(pool: PooledClient, count: int) -> int:
    """Send requests that break; return how many tries they had in all."""
    before = sum(len(item.client.seen) for item in pool.replicas)
    for number in range(count):
        with pytest.raises(InternalError, match="it broke"):
            await collect(pool, ask(f"bad{number}"))
    return sum(len(item.client.seen) for item in pool.replicas) - before


def test_requests_that_fail_everywhere_shut_nobody_out() -> None:
    async def main() -> None:
        pool = pool_of(*(Picky() for _ in range(4)))
        assert await errors(pool, 6) == 12  # two tries each
        assert states(pool) == ["is up"] * 4
        assert text_of(await collect(pool)) == WHOLE
        assert all(seat.in_flight == 0 for seat in pool._core.fleet)

    run(main)


def test_one_replica_of_its_own_is_asked_once() -> None:
    async def main() -> None:
        pool = pool_of(Picky())
        assert await errors(pool, 3) == 3
        assert states(pool) == ["is up"]
        assert text_of(await collect(pool)) == WHOLE

    run(main)


def test_a_replica_that_fails_what_others_can_is_left_out() -> None:
    async def main() -> None:
        sick = Scripted(refuses=InternalError("it broke"))
        pool = pool_of(sick, Scripted())
        for _ in range(8):
            assert text_of(await collect(pool)) == WHOLE
        assert states(pool)[0] != "is up"
        assert len(sick.seen) < 8

    run(main)


def test_a_replica_that_fails_everything_is_noticed_where_none_can_tell() -> None:
    async def main() -> None:
        pool = PooledClient([Replica(id="r", client=Picky())], QUICK)
        assert await errors(pool, 11) == 11
        assert pool._core.fleet.get("r").breaker.state == "closed"
        await errors(pool, 1)
        assert pool._core.fleet.get("r").breaker.state == "open"

    run(main)


def test_the_callers_fault_counts_for_nothing() -> None:
    async def main() -> None:
        pool = pool_of(*(Scripted(refuses=UserError("no", code="grammar_failed")) for _ in "ab"))
        for _ in range(20):
            with pytest.raises(UserError):
                await collect(pool)
        assert states(pool) == ["is up"] * 2
        assert sum(len(item.client.seen) for item in pool.replicas) == 20

    run(main)


def test_an_error_in_the_middle_of_a_lone_stream_is_told_at_once() -> None:
    class Breaks(Scripted):
        async def _pause(self, num_made: int) -> None:
            if num_made == 3:
                raise InternalError("it broke")

    async def main() -> None:
        pool = pool_of(Breaks())
        with pytest.raises(InternalError, match="it broke"):
            await collect(pool)
        assert len(pool.replicas[0].client.seen) == 1

    run(main)


def test_encodings_have_two_tries_too() -> None:
    async def main() -> None:
        pool = pool_of(*(Scripted(refuses=InternalError("it broke")) for _ in range(4)))
        for _ in range(3):
            with pytest.raises(InternalError, match="it broke"):
                await pool.encode(Encode(request_id="e", sequences=[[1]]))
        assert sum(len(item.client.seen) for item in pool.replicas) == 6
        assert states(pool) == ["is up"] * 4

    run(main)


def test_a_death_counts_as_before() -> None:
    async def main() -> None:
        engines = [Scripted(refuses=EngineDiedError("it died")), Scripted()]
        pool = pool_of(*engines)
        for _ in range(8):
            assert text_of(await collect(pool)) == WHOLE
        assert states(pool)[0] != "is up"

    run(main)
