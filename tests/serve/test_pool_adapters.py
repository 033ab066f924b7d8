"""Adapters on pools: given to all or to none, kept over restarts, never mixed within an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mxn.engine.adapters import NOT_FOUND_CODE
from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Generate,
    LoadAdapter,
    SamplingParams,
    UnloadAdapter,
)
from mxn.errors import EngineDiedError, NotFoundError, UserError
from mxn.serve.app import create_app
from mxn.serve.fleet import PoolRules, Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.replicas.remote import RemoteEngine
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.testing import Scripted

RULES = PoolRules(probe_s=0.02, recover_s=0.5)


class Box(Scripted):
    """A replica elsewhere, whose adapters are gone after a restart."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.held: dict[str, str] = {}
        self.fails: Exception | None = None
        self.num_loads = 0
        self.used: list[str] = []  # the path of each request that began

    def restart(self) -> None:
        self.held.clear()

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded:
        await asyncio.sleep(0.005)
        self._check()
        if self.fails is not None:
            raise self.fails
        self.num_loads += 1
        self.held[request.name] = request.path
        return AdapterLoaded(request_id=request.request_id, adapters=tuple(self.held))

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded:
        await asyncio.sleep(0.005)
        self._check()
        if self.held.pop(request.name, None) is None:
            raise UserError("adapter not loaded")  # what is left of it behind HTTP
        return AdapterLoaded(request_id=request.request_id, adapters=tuple(self.held))

    def _check(self) -> None:
        if not self.is_healthy:
            raise EngineDiedError("it is down")

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        if request.adapter is not None and self.is_healthy:
            if request.adapter not in self.held:
                raise NotFoundError("adapter is not loaded", code=NOT_FOUND_CODE)
            self.used.append(self.held[request.adapter])
        async for delta in super().generate(request):
            yield delta


def load(name: str, path: str = "/x") -> LoadAdapter:
    return LoadAdapter(request_id=f"load-{name}", name=name, path=path)


def unload(name: str) -> UnloadAdapter:
    return UnloadAdapter(request_id=f"unload-{name}", name=name)


def pool_of(*boxes: Box) -> PooledClient:
    return PooledClient([Replica(id="abc"[i], client=box) for i, box in enumerate(boxes)], RULES)


def begin(pool: PooledClient, count: int = 0, name: str = "lora") -> AsyncIterator[Delta]:
    sampling = SamplingParams(max_tokens=6)
    return pool.generate(
        Generate(request_id=f"r{count}", prompt_ids=[1], sampling=sampling, adapter=name)
    )


async def text(pool: PooledClient, count: int = 0, name: str = "lora") -> str:
    return "".join([delta.text async for delta in begin(pool, count, name)])


async def until(condition, what: str) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


def run(pool: PooledClient, check) -> None:
    async def call() -> None:
        try:
            async with asyncio.timeout(10):
                await check()
        finally:
            await pool.close()

    asyncio.run(call())


def test_a_load_that_one_replica_refuses_leaves_nothing_on_the_others():
    a, b = Box(), Box()
    pool = pool_of(a, b)

    async def check() -> None:
        b.fails = NotFoundError("no such folder here")
        with pytest.raises(NotFoundError, match="no such folder here"):
            await pool.load_adapter(load("lora"))
        assert (a.held, b.held, pool.adapters) == ({}, {}, ())
        b.fails = None
        await pool.load_adapter(load("lora", "/old"))
        b.fails = NotFoundError("no such folder here")
        with pytest.raises(NotFoundError):
            await pool.load_adapter(load("lora", "/new"))
        assert a.held == b.held == {"lora": "/old"}
        assert pool.adapters == ("lora",)
        assert [await text(pool, i) for i in range(4)] == ["abcdef"] * 4
        await pool.unload_adapter(unload("lora"))
        assert a.held == b.held == {}
        with pytest.raises(NotFoundError) as caught:
            await text(pool)
        assert caught.value.code == NOT_FOUND_CODE
        with pytest.raises(UserError, match="not loaded"):
            await pool.unload_adapter(unload("lora"))

    run(pool, check)


def test_a_restart_that_nobody_saw_fails_no_request():
    a, b = Box(), Box()
    pool = pool_of(a, b)

    async def check() -> None:
        await pool.load_adapter(load("lora"))
        b.restart()
        assert await asyncio.gather(*(text(pool, i) for i in range(20))) == ["abcdef"] * 20
        await until(lambda: b.held == {"lora": "/x"}, "b has it again")
        assert [seat.state(pool.now_s) for seat in pool.seats()] == ["is up", "is up"]

    run(pool, check)


def test_the_only_replica_is_given_its_adapter_before_the_request():
    a = Box()
    pool = pool_of(a)

    async def check() -> None:
        await pool.load_adapter(load("lora"))
        a.restart()
        assert await text(pool) == "abcdef"
        a.restart()
        a.fails = NotFoundError("no such folder any more")
        with pytest.raises(EngineDiedError, match="no such folder any more") as caught:
            await text(pool)
        assert caught.value.retry_after_s
        assert a.num_loads == 2

    run(pool, check)


def test_new_and_recovered_replicas_get_what_the_pool_keeps():
    a, b, c = Box(), Box(), Box()
    pool = pool_of(a, b)

    async def check() -> None:
        b.is_healthy = False
        await pool.load_adapter(load("lora"))
        await pool.load_adapter(load("other"))
        assert set(a.held) == {"lora", "other"}
        assert b.held == {}
        await text(pool)  # the prober runs from the first request on
        pool.add(Replica(id="c", client=c))
        await until(lambda: set(c.held) == {"lora", "other"}, "c has all")
        b.is_healthy = True
        await until(lambda: set(b.held) == {"lora", "other"}, "b has all")
        b.is_healthy = False
        await pool.unload_adapter(unload("other"))
        assert set(a.held) == set(c.held) == {"lora"}
        b.is_healthy = True
        await until(lambda: set(b.held) == {"lora"}, "b forgets it too")

    run(pool, check)


def test_a_replica_that_cannot_load_it_gets_no_request_for_it():
    a, b = Box(), Box()
    pool = pool_of(a, b)

    async def check() -> None:
        await pool.load_adapter(load("lora"))
        b.restart()
        b.fails = NotFoundError("the disk is gone")
        assert [await text(pool, i) for i in range(12)] == ["abcdef"] * 12
        assert b.used == []
        assert len(a.used) == 12

    run(pool, check)


@pytest.mark.parametrize("change", ["replaced", "unloaded", "reloaded", "none"])
def test_an_answer_never_goes_on_with_other_weights(change):
    a, b = Box(token_s=0.01), Box(token_s=0.01)
    pool = pool_of(a, b)

    async def check() -> None:
        await pool.load_adapter(load("lora", "/old"))
        stream = begin(pool)
        said = (await anext(stream)).text
        if change == "replaced":
            await pool.load_adapter(load("lora", "/new"))
        elif change in ("unloaded", "reloaded"):
            await pool.unload_adapter(unload("lora"))
        if change == "reloaded":
            await pool.load_adapter(load("lora", "/new"))
        first = a if a.seen else b
        first.die()
        if change == "none":
            assert said + "".join([delta.text async for delta in stream]) == "abcdef"
            return
        with pytest.raises(EngineDiedError, match="was replaced or unloaded while"):
            async for _ in stream:
                pass
        other = b if first is a else a
        assert not other.seen

    run(pool, check)


def test_an_answer_that_began_during_a_replacement_is_not_resumed():
    a, b = Box(token_s=0.01), Box(token_s=0.01)
    pool = pool_of(a, b)

    async def check() -> None:
        await pool.load_adapter(load("lora", "/old"))
        b.fails = NotFoundError("no such folder")
        replacing = asyncio.create_task(pool.load_adapter(load("lora", "/new")))
        await asyncio.sleep(0)
        stream = begin(pool)
        await anext(stream)
        with pytest.raises(NotFoundError):
            await replacing
        (a if a.seen else b).die()
        with pytest.raises(EngineDiedError, match="was replaced"):
            async for _ in stream:
                pass

    run(pool, check)


def test_replicas_behind_http_get_their_adapters_again():
    boxes = Box(), Box()

    def app(box: Box):
        tokenizer = EchoEngine().tokenizer
        return create_app(ServedModels([ServedModel(name="m", client=box, tokenizer=tokenizer)]))

    async def check(urls: list[str]) -> None:
        engines = [await RemoteEngine.connect(url, "m") for url in urls]
        pool = PooledClient(
            [Replica(id=url, client=e) for url, e in zip(urls, engines, strict=True)], RULES
        )
        try:
            boxes[1].fails = NotFoundError("no such folder here")
            with pytest.raises(UserError, match="no such folder here"):
                await pool.load_adapter(load("lora"))
            assert [box.held for box in boxes] == [{}, {}]
            boxes[1].fails = None
            await pool.load_adapter(load("lora"))
            boxes[1].restart()
            assert [await text(pool, i) for i in range(10)] == ["abcdef"] * 10
            await until(lambda: boxes[1].held == {"lora": "/x"}, "it is loaded again")
            await pool.unload_adapter(unload("lora"))
            assert [box.held for box in boxes] == [{}, {}]
        finally:
            await pool.close()

    with running(app(boxes[0])) as first, running(app(boxes[1])) as second:
        asyncio.run(check([first, second]))
