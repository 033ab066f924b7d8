"""Several engine processes behind one name: how they share a machine, and what a kill does."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import cast

import psutil
import pytest

from mxn.engine.client import ProcessEngine
from mxn.engine.config import KV_FRACTION_HOST, EngineConfig
from mxn.engine.protocol import Generate, SamplingParams
from mxn.errors import ConfigError, MxnError
from mxn.serve.context import RequestContext, enter
from mxn.serve.launch import ModelRequest, replica_configs, spread, start_pool
from mxn.serve.served import ServedModels
from support.forked_engines import quickly

TINY = "mxn.engine.testing:load_tiny"


def request(model: str = "tiny", *devices: str, **settings: object) -> ModelRequest:
    config = EngineConfig(model=model, loader=TINY, **settings)  # type: ignore[arg-type]
    return ModelRequest(name="tiny", config=config, devices=devices)


@pytest.mark.parametrize(
    ("device", "replicas", "expected"),
    [
        ("cpu", None, ("cpu",)),
        ("cpu", 2, ("cpu", "cpu")),
        ("cuda:0, cuda:1", None, ("cuda:0", "cuda:1")),
        ("cuda:0,cuda:1", 3, ("cuda:0", "cuda:1", "cuda:0")),
        ("auto", None, ("auto",)),
    ],
)
def test_replicas_are_spread_over_devices(
    device: str, replicas: int | None, expected: tuple[str, ...]
) -> None:
    assert spread(device, replicas) == expected


def test_several_replicas_on_auto_use_devices_that_exist() -> None:
    devices = spread("auto", 3)
    assert len(devices) == 3
    assert all(":" in device for device in devices)


def test_impossible_spreads_are_refused() -> None:
    for device, replicas in (("cuda:0,cuda:1", 1), ("cuda:0,,cuda:1", None)):
        with pytest.raises(ConfigError):
            spread(device, replicas)


def test_replicas_share_cores_and_memory() -> None:
    alone, *_ = replica_configs(request("tiny", "cpu", threads=6))
    assert alone.threads == 6
    assert alone.kv_fraction is None
    pair = replica_configs(request("tiny", "cpu", "cpu"))
    assert sum(config.threads for config in pair) <= max(2, EngineConfig(model="x").num_threads)
    assert sum(config.kv_fraction or 0 for config in pair) == KV_FRACTION_HOST
    apart = replica_configs(request("tiny", "cuda:0", "cuda:1"))
    assert [config.device for config in apart] == ["cuda:0", "cuda:1"]
    assert [config.kv_fraction for config in apart] == [None, None]


def test_one_replica_that_cannot_be_loaded_leaves_none_behind() -> None:
    before = set(psutil.Process().children())

    async def work() -> None:
        with pytest.raises(MxnError):
            await start_pool(ServedModels(), request("tiny", "cpu", "abacus:0", threads=1))

    asyncio.run(work())
    assert set(psutil.Process().children()) <= before


def test_a_killed_replica_ends_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy streams of real engine processes are the same with and without a kill."""
    quickly(monkeypatch)
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    contexts: list[RequestContext] = []

    async def work() -> None:
        served = ServedModels()
        served.expect("tiny")
        pool = await start_pool(served, request("tiny?step_s=0.003", "cpu", "cpu", threads=1))

        async def one(number: int, *, kills: bool = False) -> tuple[str, list[int]]:
            enter(context := RequestContext())
            contexts.append(context)
            text, ids = "", []
            message = Generate(
                request_id=f"q{len(contexts)}", prompt_ids=[5, 6, number], sampling=sampling
            )
            async for delta in pool.generate(message):
                text += delta.text
                ids += delta.token_ids
                if kills and len(ids) >= 20:
                    kills = False
                    victim = next(r for r in pool.replicas if r.id == context.hops[0].replica)
                    pid = cast("ProcessEngine", victim.client).pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
            return text, ids

        try:
            calm = [await one(number) for number in range(4)]
            contexts.clear()
            tasks = [asyncio.create_task(one(n, kills=n == 0)) for n in range(4)]
            assert await asyncio.gather(*tasks) == calm
        finally:
            await pool.close()

    asyncio.run(work())
    assert max(len(context.hops) for context in contexts) == 2
