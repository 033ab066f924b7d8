"""PooledClient: one stream out of several replicas, without a seam."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from mxn.engine.protocol import Delta, Encode, Generate, SamplingParams
from mxn.errors import (
    CapacityError,
    ConfigError,
    EngineDiedError,
    NotFoundError,
    OverloadedError,
    UnsupportedError,
    UserError,
)
from mxn.ledger.types import Principal
from mxn.serve.context import RequestContext, enter
from mxn.serve.fleet import PoolRules, Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.routing.admission import AdmissionRules
from mxn.serve.routing.breaker import BreakerRules
from mxn.serve.testing import Scripted

WHOLE = "abcdefghij"
QUICK = PoolRules(stall_floor_s=0.05, first_token_floor_s=0.1, probe_s=0.05, recover_s=0.5)


def pool_of(*engines: Scripted, rules: PoolRules = QUICK, **options: Any) -> PooledClient:
    replicas = [Replica(id=f"r{at}", client=engine, **options) for at, engine in enumerate(engines)]
    return PooledClient(replicas, rules)


def ask(request_id: str = "q", **fields: Any) -> Generate:
    fields = {"prompt_ids": [1, 2, 3], "sampling": SamplingParams()} | fields
    return Generate(request_id=request_id, **fields)


async def collect(pool: PooledClient, request: Generate | None = None) -> list[Delta]:
    return [delta async for delta in pool.generate(request or ask())]


def run(work: Callable[[], Awaitable[Any]], context: RequestContext | None = None) -> Any:
    async def main() -> Any:
        enter(context or RequestContext())
        async with asyncio.timeout(10):
            return await work()

    return asyncio.run(main())


def check_whole(deltas: list[Delta]) -> None:
    assert "".join(delta.text for delta in deltas) == WHOLE
    assert [i for delta in deltas for i in delta.token_ids] == list(range(10))
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].completion_tokens == 10
    assert {delta.request_id for delta in deltas} == {"q"}
    assert {delta.prompt_tokens for delta in deltas} == {3}
    assert {delta.cached_tokens for delta in deltas} == {1}
    assert sum(delta.device_s for delta in deltas) == 0.5


def test_an_undisturbed_stream_passes_unchanged() -> None:
    pool = pool_of(Scripted(), Scripted())
    check_whole(run(lambda: collect(pool)))


@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("first_holds", [0, 3])
@pytest.mark.parametrize("second_holds", [0, 3])
@pytest.mark.parametrize("how", ["dies_at", "stalls_at", "gives_up_at"])
def test_a_stream_goes_on_from_another_replica(
    how: str, at: int, first_holds: int, second_holds: int
) -> None:
    rules = PoolRules(stall_floor_s=0.01, first_token_floor_s=0.01, probe_s=9)
    first = Scripted(holds=first_holds, **cast("Any", {how: at}))
    second = Scripted(holds=second_holds, chip="sim-b")
    context = RequestContext()
    deltas = run(lambda: collect(pool_of(first, second, rules=rules)), context)
    check_whole(deltas)
    assert [hop.chip for hop in context.hops] == ["sim-a", "sim-b"]
    assert context.hops[1].resumed_tokens == at
    (resumed,) = second.seen
    assert isinstance(resumed, Generate)
    assert resumed.resume_ids == list(range(at))
    assert resumed.request_id != "q", "the other replica may still know the first id"


def test_three_failures_in_a_row_leave_no_seam() -> None:
    engines = [Scripted(dies_at=2, holds=1), Scripted(dies_at=5), Scripted(stalls_at=7), Scripted()]
    check_whole(run(lambda: collect(pool_of(*engines))))


def test_a_request_that_came_with_resume_ids_moves_with_all_of_them() -> None:
    first, second = Scripted(dies_at=5), Scripted()
    deltas = run(lambda: collect(pool_of(first, second), ask(resume_ids=[0, 1, 2])))
    assert "".join(delta.text for delta in deltas) == WHOLE
    assert [i for delta in deltas for i in delta.token_ids] == list(range(3, 10))
    assert cast("Generate", second.seen[0]).resume_ids == [0, 1, 2, 3, 4]


def test_the_callers_fault_is_not_retried() -> None:
    for error in (UserError("no"), CapacityError("too long", code="context_length_exceeded")):
        first, second = Scripted(refuses=error), Scripted()
        pool = pool_of(first, second)
        with pytest.raises(type(error)):
            run(lambda pool=pool: collect(pool))
        assert not second.seen


def test_a_full_engine_sends_the_request_to_another() -> None:
    for error in (OverloadedError("full"), CapacityError("full", code="overloaded")):
        second = Scripted()
        check_whole(run(lambda e=error, s=second: collect(pool_of(Scripted(refuses=e), s))))


def test_when_nothing_is_left_the_error_says_when_to_retry() -> None:
    pool = pool_of(Scripted(dies_at=2), Scripted(dies_at=4))
    with pytest.raises(EngineDiedError) as caught:
        run(lambda: collect(pool))
    assert caught.value.retry_after_s is not None
    with pytest.raises(EngineDiedError) as caught:
        run(lambda: collect(pool))
    assert caught.value.retry_after_s is not None
    assert "r0 is down" in str(caught.value)


def test_attempts_are_bounded() -> None:
    engines = [Scripted(gives_up_at=2) for _ in range(9)]
    with pytest.raises(EngineDiedError):
        run(lambda: collect(pool_of(*engines)))
    assert sum(len(engine.seen) for engine in engines) == QUICK.max_attempts


def test_a_stream_waits_for_its_only_replica_to_come_back() -> None:
    engine = Scripted(dies_at=4, retry_after_s=0.1)

    async def work() -> list[Delta]:
        pool = pool_of(engine)

        async def restart() -> None:
            while engine.is_healthy:
                await asyncio.sleep(0.01)
            engine.dies_at = None
            await asyncio.sleep(0.15)
            engine.is_healthy = True

        task = asyncio.create_task(restart())
        deltas = await collect(pool)
        await task
        return deltas

    deltas = run(work)
    assert "".join(delta.text for delta in deltas) == WHOLE


def test_an_iterator_that_swallows_its_cancellation_holds_nobody_up() -> None:
    check_whole(
        run(lambda: collect(pool_of(Scripted(stalls_at=3, swallows_cancel=True), Scripted())))
    )


def test_a_lone_slow_replica_is_waited_for() -> None:
    engine = Scripted(token_s=0.12, num_tokens=3)
    deltas = run(lambda: collect(pool_of(engine)))
    assert "".join(delta.text for delta in deltas) == "abc"


def test_a_lone_silent_replica_is_given_up_in_the_end() -> None:
    with pytest.raises(EngineDiedError, match="stalled"):
        run(lambda: collect(pool_of(Scripted(stalls_at=0))))


def test_closing_early_cancels_and_frees_the_seat() -> None:
    engine = Scripted(token_s=0.001)

    async def work() -> None:
        pool = pool_of(engine, max_in_flight=1)
        for at in range(3):
            async with aclosing(cast("Any", pool.generate(ask(f"q{at}")))) as deltas:
                await anext(deltas)
            assert engine.num_running == 0
        assert engine.num_cancelled == 3
        task = asyncio.create_task(collect(pool))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_running == 0
        assert len(await collect(pool)) == 10

    run(work)


def test_a_cancelled_consumer_is_not_taken_for_a_stall() -> None:
    async def work() -> None:
        pool = pool_of(Scripted(stalls_at=2), Scripted())
        task = asyncio.create_task(collect(pool))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)


def test_hops_and_waiting_are_noted() -> None:
    context = RequestContext()
    run(lambda: collect(pool_of(Scripted(token_s=0.005))), context)
    (hop,) = context.hops
    assert (hop.replica, hop.chip, hop.device) == ("r0", "sim-a", "sim:0")
    assert hop.reason == "only replica"
    assert 0.04 < context.upstream_s < 1


def test_encode_is_retried_whole() -> None:
    first, second = Scripted(dies_at=0), Scripted()
    request = Encode(request_id="e", sequences=[[1], [2]])
    encoded = run(lambda: pool_of(first, second).encode(request))
    assert len(encoded.rows) == 2
    stalled, third = Scripted(stalls_at=0), Scripted()
    assert run(lambda: pool_of(stalled, third).encode(request)).rows
    with pytest.raises(UserError):
        run(lambda: pool_of(Scripted(refuses=UserError("no")), third).encode(request))


def test_replicas_of_another_model_are_refused() -> None:
    pool = pool_of(Scripted())
    with pytest.raises(ConfigError, match="vocab_size 27"):
        pool.add(Replica(id="other", client=Scripted(vocab_size=27)))
    with pytest.raises(ConfigError, match="r0"):
        pool.add(Replica(id="r0", client=Scripted()))


def test_info_is_what_all_can_do() -> None:
    pool = pool_of(Scripted(max_context=50), Scripted(chip="sim-b"))
    assert pool.info.max_context == 50
    assert pool.chips() == ["sim-a", "sim-b"]
    assert pool.pinned("sim-b").info.max_context == 100
    with pytest.raises(NotFoundError, match="sim-a"):
        pool.pinned("sim-c")


def test_a_pinned_view_uses_only_its_chip() -> None:
    first, second = Scripted(), Scripted(chip="sim-b", dies_at=3)
    pool = pool_of(first, second).pinned("sim-b")
    with pytest.raises(EngineDiedError):
        run(lambda: collect(pool))
    assert not first.seen


def test_stats_are_sums_and_a_dead_replica_takes_nobody_along() -> None:
    first, second, third = Scripted(), Scripted(), Scripted()
    third.die()
    pool = pool_of(first, second, third)
    run(lambda: collect(pool))
    run(lambda: collect(pool))
    assert run(pool.stats).requests_total == 2
    for engine in (first, second):
        engine.die()
    with pytest.raises(EngineDiedError):
        run(pool.stats)


def test_a_removed_replica_drains_first() -> None:
    first = Scripted(token_s=0.01)

    async def work() -> list[Delta]:
        pool = pool_of(first)
        task = asyncio.create_task(collect(pool))
        await asyncio.sleep(0.02)
        pool.add(Replica(id="new", client=Scripted(chip="sim-b")))
        await pool.remove("r0")
        assert first.is_closed
        assert pool.chips() == ["sim-b"]
        return await task

    check_whole(run(work))
    assert first.num_cancelled == 0


def test_what_a_drain_does_not_wait_for_goes_on_elsewhere() -> None:
    first = Scripted(token_s=0.03)

    async def work() -> list[Delta]:
        pool = pool_of(first)
        task = asyncio.create_task(collect(pool))
        await asyncio.sleep(0.05)
        pool.add(Replica(id="new", client=Scripted()))
        await pool.remove("r0", drain_s=0.0)
        return await task

    check_whole(run(work))


def test_full_replicas_queue_requests_and_the_queue_has_an_end() -> None:
    rules = PoolRules(admission=AdmissionRules(max_waiting=2, max_wait_s=5.0))

    async def work() -> None:
        pool = pool_of(Scripted(token_s=0.005), max_in_flight=1, rules=rules)
        tasks = [asyncio.create_task(collect(pool, ask(f"q{at}"))) for at in range(4)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [item for item in done if isinstance(item, OverloadedError)]
        assert len(refused) == 1
        assert refused[0].retry_after_s >= 1
        assert sum(isinstance(item, list) for item in done) == 3
        pool._core.gate.admission.validate()

    run(work)


def test_waiting_has_a_deadline_and_leaving_the_queue_leaves_nothing() -> None:
    rules = PoolRules(admission=AdmissionRules(max_wait_s=0.02))

    async def work() -> None:
        engine = Scripted(token_s=0.02)
        pool = pool_of(engine, max_in_flight=1, rules=rules)
        first = asyncio.create_task(collect(pool, ask("a")))
        await asyncio.sleep(0.001)
        with pytest.raises(OverloadedError, match="queue"):
            await collect(pool, ask("b"))
        third = asyncio.create_task(collect(pool, ask("c")))
        await asyncio.sleep(0.001)
        third.cancel()
        await asyncio.gather(first, third, return_exceptions=True)
        assert len(pool._core.gate.admission) == 0
        assert engine.num_running == 0
        assert len(await collect(pool, ask("d"))) == 10

    run(work)


def test_tenants_share_a_full_replica_by_weight() -> None:
    done: list[str] = []

    async def one(pool: PooledClient, org: str, weight: float, at: int) -> None:
        principal = Principal(key_id="k", org_id=org, project_id="p", weight=weight)
        enter(RequestContext(principal=principal))
        await collect(pool, ask(f"{org}{at}", sampling=SamplingParams(max_tokens=3)))
        done.append(org)

    async def work() -> None:
        pool = pool_of(Scripted(), max_in_flight=1)
        jobs = [one(pool, "a", 1, at) for at in range(30)]
        jobs += [one(pool, "b", 2, at) for at in range(30)]
        await asyncio.gather(*(asyncio.create_task(job) for job in jobs))

    run(work)
    assert abs(done[:30].count("b") - 20) <= 1


def test_a_lost_replica_comes_back_after_probes() -> None:
    engine = Scripted(dies_at=3)

    async def work() -> None:
        other = Scripted(chip="sim-b")
        pool = pool_of(engine, other)
        await collect(pool)
        engine.dies_at, engine.is_healthy = None, True
        await collect(pool)
        assert len(other.seen) == 2, "held down at first"
        seat = pool._core.fleet.get("r0")
        assert seat is not None
        while not seat.health.is_up:
            await asyncio.sleep(0.02)

    run(work)


def test_requests_wait_for_a_replica_that_is_held_back_for_its_failures() -> None:
    """Others died; the one that is left is well, but failed too often a moment ago."""
    rules = PoolRules(probe_s=0.05, recover_s=5.0, breaker=BreakerRules(open_s=0.2))

    async def work() -> None:
        pool = pool_of(Scripted(), rules=rules)
        (seat,) = pool.seats()
        for _ in range(rules.breaker.open_after):
            seat.breaker.failed(pool._core.fleet.clock())
        assert not pool._core.fleet.has_any(None)
        answers = await asyncio.gather(*(collect(pool) for _ in range(5)))
        texts = ["".join(delta.text for delta in answer) for answer in answers]
        assert texts == [WHOLE] * 5
        pool._core.gate.admission.validate()
        assert seat.in_flight == 0

    run(work)


def test_a_replica_that_stays_held_back_is_not_waited_for_without_end() -> None:
    rules = PoolRules(probe_s=0.05, recover_s=0.2, breaker=BreakerRules(open_s=60.0))

    async def work() -> None:
        pool = pool_of(Scripted(), rules=rules)
        (seat,) = pool.seats()
        for _ in range(rules.breaker.open_after):
            seat.breaker.failed(pool._core.fleet.clock())
        with pytest.raises(EngineDiedError, match="failed too often"):
            await collect(pool)
        assert pool.num_queued == 0
        pool._core.gate.admission.validate()

    run(work)


class Limited(Scripted):
    """A foreign server: it lacks some parameters, and goes on with tokens of others or not."""

    count_basis = "counted"

    def __init__(self, *, without: str = "", resumes: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.without, self.resumes = without, resumes

    def lacks(self, request: Generate | Encode, *, resumes: bool = False) -> str | None:
        if isinstance(request, Encode):
            return "it scores no pairs" if request.token_types is not None else None
        if self.without and getattr(request.sampling, self.without):
            return f"it has no {self.without}"
        return "it begins anew" if resumes and not self.resumes else None


def test_a_request_goes_only_where_its_parameters_are_known() -> None:
    limited = [Limited(without="top_k") for _ in range(6)]  # more than a request has attempts
    able = Scripted(chip="sim-b")
    pool = pool_of(*limited, able)

    for _ in range(3):
        deltas = run(lambda: collect(pool, ask(sampling=SamplingParams(top_k=3))))
        assert "".join(delta.text for delta in deltas) == WHOLE
    assert len(able.seen) == 3
    assert not any(engine.seen for engine in limited)


def test_what_no_replica_can_do_is_refused_at_once() -> None:
    pool = pool_of(Limited(without="top_k"), Limited(without="top_k"))
    with pytest.raises(UnsupportedError, match="it has no top_k"):
        run(lambda: collect(pool, ask(sampling=SamplingParams(top_k=3))))
    check_whole(run(lambda: collect(pool)))
    pairs = Encode(request_id="e", sequences=[[1]], token_types=[[0]])
    with pytest.raises(UnsupportedError, match="scores no pairs"):
        run(lambda: pool.encode(pairs))
    able = Scripted()
    pool.add(Replica(id="able", client=able))
    assert len(run(lambda: pool.encode(pairs)).rows) == 1
    assert len(able.seen) == 1


def test_one_that_can_do_it_and_is_full_is_waited_for() -> None:
    """A free replica that cannot take a request is no room for it."""
    slow, limited = Scripted(token_s=0.01), Limited(without="top_k")
    replicas = [
        Replica(id="slow", client=slow, max_in_flight=1),
        Replica(id="limited", client=limited),
    ]
    pool = PooledClient(replicas, QUICK)
    wish = SamplingParams(top_k=3)

    async def work() -> list[str]:
        requests = [ask(f"q{at}", sampling=wish) for at in range(3)]
        answers = await asyncio.gather(*(collect(pool, request) for request in requests))
        return ["".join(delta.text for delta in answer) for answer in answers]

    assert run(work) == [WHOLE] * 3
    assert len(slow.seen) == 3
    assert not limited.seen


def test_an_answer_goes_on_only_where_it_can() -> None:
    pool = pool_of(Scripted(dies_at=4), Limited(resumes=False), Scripted(chip="sim-b"))
    first = pool._core.fleet.get("r0")
    assert first is not None
    for name in ("r1", "r2"):
        seat = pool._core.fleet.get(name)
        assert seat is not None
        seat.others = 5
    context = RequestContext()
    check_whole(run(lambda: collect(pool), context))
    assert [hop.replica for hop in context.hops] == ["r0", "r2"]
    pool = pool_of(Scripted(dies_at=0), Limited(resumes=False))
    check_whole(run(lambda: collect(pool)))  # nothing was made: it can begin there
    pool = pool_of(Limited(resumes=False, dies_at=4), Limited(resumes=False, dies_at=4))
    with pytest.raises(EngineDiedError):
        run(lambda: collect(pool))


def test_the_count_basis_is_that_of_the_least_exact_replica_that_served() -> None:
    async def basis(pool: PooledClient) -> str:
        await collect(pool)
        return pool.count_basis

    assert run(lambda: basis(pool_of(Scripted(), Scripted()))) == "engine"
    assert run(lambda: basis(pool_of(Limited()))) == "counted"
    assert run(lambda: basis(pool_of(Limited(dies_at=3), Scripted(chip="sim-b")))) == "counted"


def test_choices_of_one_request_and_what_takes_over_stay_on_one_chip() -> None:
    async def work() -> list[str]:
        engines = [Scripted(chip=chip, token_s=0.01) for chip in "abab"]
        pool = pool_of(*engines)
        context = RequestContext()
        enter(context)
        async with aclosing(cast("Any", pool.generate(ask()))) as deltas:
            found = [await anext(deltas)]
            for _ in range(5):  # the others would be the emptier ones
                await collect(pool)
            engines[int(context.hops[0].replica[1:])].die()
            found += [delta async for delta in deltas]
        assert "".join(delta.text for delta in found) == WHOLE
        assert context.hops[-1].is_takeover
        return [hop.chip for hop in context.hops]

    chips = run(work)
    assert len(chips) == 7
    assert len(set(chips)) == 1
