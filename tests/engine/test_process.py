"""The engine as users have it: a process of its own behind the async client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tests.engine.conftest import run

from mxn.engine.client import ProcessEngine
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Encode, Generate, SamplingParams
from mxn.engine.supervisor import RestartPolicy
from mxn.errors import CapacityError, ConfigError, EngineDiedError, NotFoundError, UserError
from support.forked_engines import quickly

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def forked(request, monkeypatch) -> None:
    """Save the imports of most; those that are about the start itself do without."""
    if "real_start" not in request.fixturenames:
        quickly(monkeypatch)


@pytest.fixture
def real_start() -> None:
    """Asked for by a test whose engine is to be started as users start it."""


@contextlib.asynccontextmanager
async def started(config, **options):
    engine = await ProcessEngine.start(config, **options)
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine, request_id: str, prompt: list[int], sampling=GREEDY) -> list[int]:
    request = Generate(request_id=request_id, prompt_ids=prompt, sampling=sampling)
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


async def until(condition, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


def test_it_loads_generates_counts_refuses_and_stops(tiny_config, real_start):
    prompts = [[i, 2, 3] for i in range(20)]
    want = [a.token_ids for a in LocalEngine.load(tiny_config()).generate(prompts, GREEDY)]
    seen = []

    async def check() -> int:
        async with started(tiny_config(), on_progress=seen.append) as engine:
            assert engine.info.kind == "decoder"
            assert engine.is_healthy
            got = await asyncio.gather(
                *(answer(engine, f"r{i}", prompt) for i, prompt in enumerate(prompts))
            )
            assert got == want
            with pytest.raises(CapacityError, match="600 tokens, the context is 512") as caught:
                await answer(engine, "long", [1] * 600)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(UserError, match="token id 999"):
                await answer(engine, "bad", [999])
            with pytest.raises(UserError, match=r"Expected `int`, got `str`"):
                await answer(engine, "malformed", [1, "x"])
            with pytest.raises(UserError, match="cannot embed"):
                await engine.encode(Encode(request_id="e", sequences=[[1]]))
            stats = await engine.stats()
            assert (stats.requests_total, stats.generation_tokens_total) == (20, 240)
            assert (stats.num_running, stats.kv_pages_used) == (0, 0)
            return engine.pid

    pid = run(check())
    assert {event.stage for event in seen} == {"weights", "cache"}
    assert not psutil.pid_exists(pid)


def test_closing_the_stream_or_cancelling_its_task_frees_the_pages(tiny_config):
    async def check() -> None:
        async with started(tiny_config("tiny?step_s=0.005")) as engine:

            async def is_empty() -> bool:
                stats = await engine.stats()
                return stats.num_running + stats.num_waiting + stats.kv_pages_used == 0

            stream = engine.generate(Generate(request_id="a", prompt_ids=[1], sampling=LONG))
            await anext(stream)
            assert not await is_empty()
            await stream.aclose()
            await until(is_empty)
            task = asyncio.create_task(answer(engine, "b", [1], LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(is_empty)
            assert (await engine.stats()).requests_cancelled_total == 2
            assert engine._link().num_waiting == 0

    run(check())


def test_a_killed_engine_fails_its_streams_and_comes_back(tiny_config):
    async def check() -> None:
        policy = RestartPolicy(first_delay_s=0.05)
        async with started(tiny_config("tiny?step_s=0.005"), policy=policy) as engine:
            want = await answer(engine, "before", [1, 2])
            first_pid = engine.pid
            stream = engine.generate(Generate(request_id="a", prompt_ids=[1], sampling=LONG))
            await anext(stream)
            waiting = asyncio.create_task(answer(engine, "b", [2], LONG))
            await asyncio.sleep(0)
            os.kill(first_pid, signal.SIGKILL)
            with pytest.raises(EngineDiedError, match="killed by SIGKILL"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDiedError, match="killed by SIGKILL"):
                await waiting
            assert not engine.is_healthy
            with pytest.raises(EngineDiedError, match="restarting") as caught:
                await answer(engine, "c", [1])
            assert caught.value.retry_after_s >= 1

            async def is_back() -> bool:
                return engine.is_healthy

            await until(is_back)
            assert engine.pid != first_pid
            assert engine.num_restarts == 1
            assert engine.last_crash.exit_code == -signal.SIGKILL
            assert await answer(engine, "before", [1, 2]) == want

    run(check())


def test_an_engine_that_dies_again_and_again_is_given_up(tiny_config):
    async def check() -> None:
        policy = RestartPolicy(max_crashes=2, first_delay_s=0.01)
        async with started(tiny_config("tiny?exit_at=2"), policy=policy) as engine:
            for _ in range(2):

                async def is_back() -> bool:
                    return engine.is_healthy

                await until(is_back)
                with pytest.raises(EngineDiedError, match="exit status 3"):
                    await answer(engine, "a", [1])

            assert engine.state == "failed"
            with pytest.raises(EngineDiedError, match="gave up after 2 crashes") as caught:
                await answer(engine, "b", [1])
            assert caught.value.retry_after_s is None

    run(check())


def test_a_model_that_is_not_there_is_said_and_nothing_is_left_running(tiny_config, real_start):
    before = set(psutil.Process().children(recursive=True))  # of other tests of this worker

    async def check() -> None:
        with pytest.raises(NotFoundError, match="no model at") as caught:
            await ProcessEngine.start(tiny_config("tiny?refuse=1"))
        assert caught.value.hint == "this is a test"

    run(check())
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in left if "mxn" in _name(p)]


def test_a_loader_that_crashes_shows_the_end_of_its_log(tiny_config, real_start):
    config = tiny_config()
    broken = type(config)(model="x", loader="mxn.engine.nowhere:load")

    async def check() -> None:
        with pytest.raises(Exception, match=r"No module named 'mxn.engine.nowhere'"):
            await ProcessEngine.start(broken)

    run(check())


def test_embeddings_come_through_the_process(tiny_config):
    import numpy as np

    async def check() -> None:
        async with started(tiny_config("tiny-encoder")) as engine:
            both = await engine.encode(Encode(request_id="a", sequences=[[1, 2], [3]]))
            one = await engine.encode(Encode(request_id="b", sequences=[[3]]))
            rows = [np.frombuffer(row, dtype="<f4") for row in (both.rows[1], one.rows[0])]
            np.testing.assert_array_equal(*rows)
            with pytest.raises(UserError, match="cannot generate"):
                await answer(engine, "g", [1])

    run(check())


def test_an_idle_engine_uses_no_processor_time(tiny_config, real_start):
    async def check() -> None:
        async with started(tiny_config()) as engine:
            await answer(engine, "a", [1])
            process = psutil.Process(engine.pid)
            before = process.cpu_times()
            await asyncio.sleep(1.0)
            after = process.cpu_times()
            assert after.user + after.system - before.user - before.system <= 0.02

    run(check())


PARENT = """
import asyncio, sys
from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
async def main():
    config = EngineConfig(model="tiny", loader="mxn.engine.testing:load_tiny", threads=1)
    engine = await ProcessEngine.start(config)
    print(engine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_ends_when_its_parent_dies(how, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(how)
    engine.wait(timeout=10)
    assert list(tmp_path.iterdir()) == []  # the parent could not remove the socket any more


def test_sigterm_ends_an_engine_cleanly_while_it_works(tiny_config):
    async def check() -> None:
        policy = RestartPolicy(first_delay_s=60.0)
        async with started(tiny_config("tiny?step_s=0.005"), policy=policy) as engine:
            task = asyncio.create_task(answer(engine, "a", [1], LONG))
            await asyncio.sleep(0.1)
            os.kill(engine.pid, signal.SIGTERM)
            with pytest.raises(EngineDiedError, match="shutting down"):  # 503, not 500
                await task

            async def is_gone() -> bool:
                return engine.last_crash is not None

            await until(is_gone)
            assert engine.last_crash.exit_code == 0

    run(check())


def test_no_socket_folder_is_left_behind(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def check() -> None:
        async with started(tiny_config()):
            assert [oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()] == ["0o700"]

    run(check())
    assert list(Path(tmp_path).iterdir()) == []


def test_a_folder_too_deep_for_a_socket_is_said_and_left_clean(tiny_config, tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="longer than"):
        run(ProcessEngine.start(tiny_config()))
    assert list(deep.iterdir()) == []


def test_an_engine_that_cannot_be_started_leaves_nothing_behind(
    tiny_config, tmp_path, monkeypatch, real_start
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(FileNotFoundError):
        run(ProcessEngine.start(tiny_config()))
    assert list(tmp_path.iterdir()) == []


def test_a_request_to_an_engine_that_has_just_died_does_not_stop_the_event_loop(
    tiny_config, real_start
):
    async def check() -> None:
        policy = RestartPolicy(first_delay_s=60.0)
        async with started(tiny_config(), policy=policy) as engine:
            process = psutil.Process(engine.pid)
            process.kill()
            # The loop is busy meanwhile, so nobody has noticed; the socket has no peer any more.
            with contextlib.suppress(psutil.NoSuchProcess):  # reaped by the child watcher's thread
                while process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
            time.sleep(0.2)
            assert engine.is_healthy
            with pytest.raises(EngineDiedError, match="SIGKILL"):
                await answer(engine, "a", [1])

    # A thread of its own: a loop that is stopped could not even time out.
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run(check())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert failures == []


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_the_client_loads_nothing_heavy():
    code = (
        "import sys, mxn.engine.client; "
        "print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
