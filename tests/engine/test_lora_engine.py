"""Adapters in the loop: mixed batches, generations and the prefix cache, drains, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.engine.conftest import run
from tests.engine.test_lora_parity import ATTENTION, MLP, train

from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import (
    AdapterLoaded,
    Cancel,
    Delta,
    Generate,
    LoadAdapter,
    SamplingParams,
    UnloadAdapter,
)
from mxn.engine.supervisor import RestartPolicy
from mxn.errors import (
    CapacityError,
    ConfigError,
    EngineDiedError,
    NotFoundError,
    UnsupportedError,
    UserError,
)
from support import tiny

pytestmark = pytest.mark.usefixtures("forked_engines")

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
LOADER = "mxn.engine.testing:load_bytes"
PROMPTS = [list(range(3 + i, 12 + 3 * i)) for i in range(9)]
NAMES = [None, "a", "b", "b", "a", None, "a", None, "b"]


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family) -> Path:
    return made(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("qwen"), "qwen3")


def made(path: Path, family: str) -> Path:
    """Write a base model and adapters `a` and `b` of different ranks and modules."""
    targets = [*ATTENTION, *MLP] if family == "qwen3" else r".*(q_b|kv_b|kv_a|o)_proj(_with_mqa)?"
    train(tiny.write(family, path / "base"), path / "a", seed=1, target_modules=targets)
    train(tiny.write(family, path / "base"), path / "b", seed=2, target_modules=["o_proj"], r=7)
    return path


def config_of(folder: Path, **settings) -> EngineConfig:
    defaults = {
        "device": os.environ.get("MXN_TEST_DEVICE", "cpu"), "threads": 1, "page_tokens": 4,
        "max_sequences": 16, "max_batch_tokens": 64, "kv_bytes": 4 << 20, "max_context": 500,
    }  # fmt: skip
    model = str(folder / "base")
    return EngineConfig(model=model, loader=LOADER, **(defaults | settings))


def engine_of(folder: Path, *names: str, **settings) -> LocalEngine:
    engine = LocalEngine.load(config_of(folder, **settings))
    for name in names:
        engine.load_adapter(name, str(folder / name))
    return engine


def tokens(answers) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_two_adapters_and_the_base_in_one_batch_equal_three_runs(folder):
    engine = engine_of(folder, "a", "b", max_batch_tokens=24)
    together = tokens(engine.generate(PROMPTS, GREEDY, NAMES))
    plain = tokens(engine_of(folder).generate(PROMPTS, GREEDY))
    for name in (None, "a", "b"):
        alone = engine_of(folder, *([name] if name else []), prefix_caching=False)
        mine = [i for i, own in enumerate(NAMES) if own == name]
        prompts = [PROMPTS[i] for i in mine]
        want = tokens(alone.generate(prompts, GREEDY, [name] * len(mine)))
        assert [together[i] for i in mine] == want
        assert all((together[i] == plain[i]) == (name is None) for i in mine)
    engine.core.validate()


def test_preemption_keeps_the_tokens_of_adapters(qwen):
    want = tokens(engine_of(qwen, "a", "b").generate(PROMPTS, GREEDY, NAMES))
    tight = engine_of(qwen, "a", "b", kv_bytes=40 * 4 * 2 * 3 * 2 * 16 * 4, max_context=80)
    assert tokens(tight.generate(PROMPTS, GREEDY, NAMES)) == want
    assert tight.stats().preemptions_total > 0


def test_adapters_share_no_pages_with_others_nor_with_an_earlier_load(qwen):
    engine = engine_of(qwen, "a")
    prompt = list(range(10, 40))

    def cached(adapter: str | None) -> int:
        return engine.generate([prompt], GREEDY, [adapter])[0].cached_tokens

    assert [cached(None), cached("a"), cached(None), cached("a")] == [0, 0, 28, 28]
    shutil.copytree(qwen / "a", qwen / "again", dirs_exist_ok=True)
    engine.load_adapter("a", str(qwen / "again"))
    assert [cached("a"), cached(None)] == [0, 28]
    old = tokens(engine.generate([prompt], GREEDY, ["a"]))
    engine.load_adapter("a", str(qwen / "b"))
    assert tokens(engine.generate([prompt], GREEDY, ["a"])) != old


def test_an_adapter_that_is_unloaded_stays_until_its_users_have_ended(qwen):
    engine = engine_of(qwen, "a")
    want = tokens(engine.generate([PROMPTS[0]], GREEDY, ["a"]))[0]
    core, got = engine.core, []
    generate = Generate(request_id="g", prompt_ids=PROMPTS[0], sampling=GREEDY, adapter="a")
    assert core.handle(generate) == []
    core.step()
    assert core.handle(UnloadAdapter(request_id="u", name="a")) == []
    (refused,) = core.handle(
        Generate(request_id="late", prompt_ids=[5], sampling=GREEDY, adapter="a")
    )
    assert "adapter 'a' is not loaded; loaded: none" in refused.message
    engine.load_adapter("a", str(qwen / "b"))  # under the same name, while the old one drains
    while core.has_work:
        got += core.step()
    done = [reply for reply in got if isinstance(reply, AdapterLoaded)]
    assert done == [AdapterLoaded(request_id="u", adapters=("a",))]
    assert isinstance(got[-1], AdapterLoaded), "the answer comes behind the last delta"
    assert [t for d in got if isinstance(d, Delta) for t in d.token_ids][-11:] == want[-11:]
    assert core.handle(generate) == []
    core.handle(UnloadAdapter(request_id="u2", name="a"))
    cancelled = core.handle(Cancel(request_id="g"))
    assert [type(reply).__name__ for reply in cancelled] == ["Delta", "AdapterLoaded"]
    assert type(core._runner._model.layers[0].attention.out).__name__ != "AdaptedLinear"


def test_what_cannot_be_loaded_says_why_and_disturbs_nothing(qwen, tiny_config):
    engine = engine_of(qwen, "a", max_adapters=1)
    with pytest.raises(CapacityError, match="1 adapters are loaded, which is the limit"):
        engine.load_adapter("b", str(qwen / "b"))
    with pytest.raises(NotFoundError, match="is not a folder"):
        engine.load_adapter("a", str(qwen / "nowhere"))
    with pytest.raises(NotFoundError, match="adapter 'x' is not loaded; loaded: 'a'"):
        engine.unload_adapter("x")
    with pytest.raises(NotFoundError, match="adapter 'x' is not loaded"):
        engine.generate([[5]], GREEDY, ["x"])
    assert len(tokens(engine.generate([[5]], GREEDY, ["a"]))[0]) == 12
    with pytest.raises(UnsupportedError, match="TinyModel takes no adapters"):
        LocalEngine.load(tiny_config()).load_adapter("a", str(qwen / "a"))
    with pytest.raises(ConfigError, match="max_adapters must be 0 or more, got -1"):
        tiny_config(max_adapters=-1)


@contextlib.asynccontextmanager
async def started(config, **options):
    engine = await ProcessEngine.start(config, **options)
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine, request_id, prompt, adapter, sampling=GREEDY) -> list[int]:
    request = Generate(request_id=request_id, prompt_ids=prompt, sampling=sampling, adapter=adapter)
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


def loading(folder: Path, name: str, count: int = 0) -> LoadAdapter:
    return LoadAdapter(request_id=f"load-{name}-{count}", name=name, path=str(folder / name))


def test_adapters_come_and_go_under_traffic(qwen):
    local = engine_of(qwen, "a", "b")
    want = {n: tokens(local.generate([PROMPTS[3]], GREEDY, [n]))[0] for n in (None, "a", "b")}

    async def check() -> None:
        async with started(config_of(qwen)) as engine:
            await engine.load_adapter(loading(qwen, "a"))
            is_over = asyncio.Event()

            async def traffic(user: int, adapter: str | None) -> int:
                count = 0
                while not is_over.is_set():
                    got = await answer(engine, f"{user}-{count}", PROMPTS[3], adapter)
                    assert got == want[adapter]
                    count += 1
                return count

            users = [asyncio.create_task(traffic(i, n)) for i, n in enumerate((None, "a") * 3)]
            for count in range(8):
                await engine.load_adapter(loading(qwen, "b", count))
                assert engine.adapters == ("a", "b")
                mine = asyncio.create_task(answer(engine, f"b{count}", PROMPTS[3], "b"))
                await asyncio.sleep(0.01)
                done = await engine.unload_adapter(UnloadAdapter(request_id="u", name="b"))
                assert done.adapters == ("a",)
                assert mine.done(), "unloading waits for the last user"
                assert await mine == want["b"]
                with pytest.raises(NotFoundError, match="adapter 'b' is not loaded"):
                    await answer(engine, f"late{count}", PROMPTS[3], "b")
            is_over.set()
            assert min(await asyncio.gather(*users)) > 0
            with pytest.raises(UserError, match="is not a folder"):
                await engine.load_adapter(loading(qwen, "nowhere"))
            assert (await engine.stats()).kv_pages_used == 0

    run(check())


def test_a_new_process_has_the_adapters_again(qwen, tmp_path, caplog):
    want = tokens(engine_of(qwen, "a").generate([PROMPTS[3]], GREEDY, ["a"]))[0]
    gone = tmp_path / "gone"
    shutil.copytree(qwen / "b", gone)

    async def check() -> None:
        policy = RestartPolicy(first_delay_s=0.05)
        async with started(config_of(qwen), policy=policy) as engine:
            loaded = await engine.load_adapter(loading(qwen, "a"))
            assert (loaded.adapters, loaded.rank) == (("a",), 4)
            assert loaded.num_parameters > 1000
            await engine.load_adapter(loading(tmp_path, "gone"))
            shutil.rmtree(gone)
            stream = asyncio.create_task(answer(engine, "s", PROMPTS[3], "a", LONG))
            unload = asyncio.create_task(answer(engine, "s2", PROMPTS[3], "gone", LONG))
            await asyncio.sleep(0.05)
            os.kill(engine.pid, signal.SIGKILL)
            for task in (stream, unload):
                with pytest.raises(EngineDiedError):
                    await task
            while not engine.is_healthy:
                await asyncio.sleep(0.02)
            assert engine.num_restarts == 1
            assert engine.adapters == ("a",)
            assert await answer(engine, "again", PROMPTS[3], "a") == want
            with pytest.raises(NotFoundError, match="adapter 'gone' is not loaded; loaded: 'a'"):
                await answer(engine, "no", PROMPTS[3], "gone")

    run(check())
    assert "adapter 'gone' is gone after a restart" in caplog.text
