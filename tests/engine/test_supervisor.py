"""The restart policy and the supervisor's states, without a process."""

from __future__ import annotations

import asyncio

import pytest

from mxn.engine.supervisor import CrashReport, RestartPolicy, Supervisor
from mxn.errors import EngineDiedError, NotFoundError


def test_the_delay_doubles_up_to_its_limit():
    policy = RestartPolicy(max_crashes=10, first_delay_s=0.5, max_delay_s=3.0)
    assert [policy.crashed(float(t)) for t in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_too_many_crashes_in_the_window_end_the_attempts():
    policy = RestartPolicy(max_crashes=3, window_s=60)
    assert [policy.crashed(t) is None for t in (0.0, 1.0, 2.0)] == [False, False, True]


def test_old_crashes_are_forgotten():
    policy = RestartPolicy(max_crashes=3, window_s=60, first_delay_s=1.0)
    assert [policy.crashed(t) for t in (0.0, 100.0, 200.0, 300.0)] == [1.0] * 4


@pytest.mark.parametrize(
    ("exit_code", "reason"),
    [(-9, "killed by SIGKILL after 2 s"), (70, "exit status 70 after 2 s")],
)
def test_a_crash_report_names_the_signal_or_the_status(exit_code, reason):
    assert CrashReport(exit_code=exit_code, log_tail=(), uptime_s=2.0).reason == reason


class _Child:
    """A process that ends when told."""

    pid = 0

    def __init__(self) -> None:
        self.end = asyncio.Event()

    async def wait(self) -> CrashReport:
        await self.end.wait()
        return CrashReport(exit_code=-9, log_tail=("last words",), uptime_s=1.0)


class _Incarnation:
    def __init__(self) -> None:
        self.child = _Child()
        self.errors: list[EngineDiedError] = []

    def ended(self, error: EngineDiedError) -> None:
        self.errors.append(error)


class _Launches:
    """Gives out incarnations, or raises, in the order of `plan`."""

    def __init__(self, *plan: Exception | None) -> None:
        self.plan = list(plan)
        self.made: list[_Incarnation] = []

    async def __call__(self) -> _Incarnation:
        outcome = self.plan.pop(0) if self.plan else None
        if outcome:
            raise outcome
        self.made.append(_Incarnation())
        return self.made[-1]


async def _until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def test_a_first_start_that_fails_is_raised_and_not_retried():
    launches = _Launches(NotFoundError("no such model"))
    with pytest.raises(NotFoundError):
        asyncio.run(Supervisor(launches).start())
    assert launches.made == []


def test_a_death_fails_what_is_under_way_and_starts_another():
    async def check() -> None:
        launches = _Launches()
        supervisor = Supervisor(launches, policy=RestartPolicy(first_delay_s=0.0))
        first = await supervisor.start()
        first.child.end.set()
        await _until(lambda: supervisor.num_restarts == 1)
        assert [error.retry_after_s for error in first.errors] == [0.0]
        assert supervisor.current is launches.made[1]
        assert supervisor.state == "ready"
        assert supervisor.last_crash.log_tail == ("last words",)
        await supervisor.close()

    asyncio.run(check())


def test_a_restart_that_fails_counts_as_a_crash_and_the_supervisor_gives_up():
    async def check() -> None:
        launches = _Launches(None, *[RuntimeError("no memory")] * 9)
        policy = RestartPolicy(max_crashes=3, first_delay_s=0.0)
        supervisor = Supervisor(launches, policy=policy)
        first = await supervisor.start()
        first.child.end.set()
        await _until(lambda: supervisor.state == "failed")
        error = supervisor.unavailable()
        assert "no memory" in error.message
        assert "gave up after 3 crashes" in error.message
        assert error.retry_after_s is None
        assert len(launches.plan) == 7  # two restarts were tried, then no more
        await supervisor.close()

    asyncio.run(check())


def test_while_restarting_a_new_request_is_told_when_to_come_back():
    async def check() -> None:
        policy = RestartPolicy(first_delay_s=20.0)
        supervisor = Supervisor(_Launches(), policy=policy, clock=lambda: 100.0)
        first = await supervisor.start()
        first.child.end.set()
        await _until(lambda: supervisor.state == "restarting")
        error = supervisor.unavailable()
        assert error.retry_after_s == 20.0
        assert "killed by SIGKILL" in error.message
        await supervisor.close()

    asyncio.run(check())
