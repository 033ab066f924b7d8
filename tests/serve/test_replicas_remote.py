"""A model of another mxn server as a replica: the same deltas, errors, cancels and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import cast

import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Encode,
    Generate,
    LoadAdapter,
    SamplingParams,
    UnloadAdapter,
)
from mxn.errors import CapacityError, EngineDiedError, NotFoundError, UserError
from mxn.ledger.types import Principal
from mxn.serve.app import create_app
from mxn.serve.context import RequestContext
from mxn.serve.fleet import Replica
from mxn.serve.gateway import CONTEXT
from mxn.serve.pooled import PooledClient
from mxn.serve.replicas.http_client import HttpClient
from mxn.serve.replicas.remote import RemoteEngine
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import bind, run, running, url_of
from mxn.serve.settings import ServeSettings


def served(name: str, engine: EchoEngine) -> ServedModel:
    return ServedModel(name=name, client=engine, tokenizer=engine.tokenizer)


def ask(text: str, request_id: str = "r", **sampling: object) -> Generate:
    params = SamplingParams(**({"temperature": 0, "max_tokens": 8} | sampling))  # type: ignore[arg-type]
    return Generate(request_id=request_id, prompt_ids=list(text.encode()), sampling=params)


async def deltas_of(engine: RemoteEngine | EchoEngine, request: Generate) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


@pytest.fixture
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def url(echo: EchoEngine) -> Iterator[str]:
    models = ServedModels(
        [
            served("org/echo", echo),
            served("embed", EchoEngine(kind="embedder")),
            served("mortal", EchoEngine(dies_after=3)),
            served("slow", EchoEngine(token_s=0.05)),
        ]
    )
    with running(create_app(models)) as url:
        yield url


def on(url: str, model: str, work) -> object:
    async def go() -> object:
        engine = await RemoteEngine.connect(url, model)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def test_a_remote_replica_gives_the_same_deltas_as_the_engine_behind_it(url: str) -> None:
    request = ask("héllo", max_tokens=20, logprobs=2, prompt_logprobs=1)
    got = cast("list[Delta]", on(url, "org/echo", lambda engine: deltas_of(engine, request)))
    want = asyncio.run(deltas_of(EchoEngine(), request))
    assert got == want
    assert len(got) == 20


def test_info_stats_and_vectors_are_those_of_the_engine(url: str, echo: EchoEngine) -> None:
    request = Encode(request_id="e", sequences=[[1, 2], [3]])

    async def work(engine: RemoteEngine) -> tuple:
        return engine.info, await engine.stats(), engine.is_healthy

    info, stats, is_healthy = cast("tuple", on(url, "org/echo", work))
    assert info == echo.info
    assert stats.kv_pages_total == echo.info.kv_pages_total
    assert is_healthy
    rows = on(url, "embed", lambda engine: engine.encode(request))
    assert rows == asyncio.run(EchoEngine(kind="embedder").encode(request))


def test_errors_of_the_replica_arrive_as_themselves(url: str, echo: EchoEngine) -> None:
    too_long = ask("x" * 5000)
    with pytest.raises(CapacityError, match="5000 tokens"):
        on(url, "org/echo", lambda engine: deltas_of(engine, too_long))
    echo.refuses = "no such wish"
    with pytest.raises(UserError, match="no such wish"):
        on(url, "org/echo", lambda engine: deltas_of(engine, ask("x")))
    with pytest.raises(NotFoundError, match="nothing"):
        on(url, "nothing", lambda engine: engine.stats())


def test_an_engine_that_dies_behind_the_server_is_a_died_engine_here(url: str) -> None:
    seen: list[Delta] = []

    async def work(engine: RemoteEngine) -> None:
        async for delta in engine.generate(ask("hello")):
            seen.append(delta)

    with pytest.raises(EngineDiedError):
        on(url, "mortal", work)
    assert sum(len(delta.token_ids) for delta in seen) == 3


def test_closing_the_iterator_cancels_on_the_server(url: str) -> None:
    async def work(engine: RemoteEngine) -> tuple[int, int]:
        stream = cast("AsyncGenerator[Delta, None]", engine.generate(ask("abc", max_tokens=1000)))
        async with contextlib.aclosing(stream) as deltas:
            async for _ in deltas:
                break
        for _ in range(100):
            stats = await engine.stats()
            if not stats.num_running:
                return stats.num_running, stats.requests_cancelled_total
            await asyncio.sleep(0.02)
        raise AssertionError("the request still runs")

    assert on(url, "slow", work) == (0, 1)


def test_many_requests_at_once_do_not_mix(url: str) -> None:
    async def work(engine: RemoteEngine) -> list[str]:
        texts = [f"text number {n}!" for n in range(40)]
        requests = [ask(text, f"r{n}", max_tokens=len(text)) for n, text in enumerate(texts)]
        answers = await asyncio.gather(*(deltas_of(engine, item) for item in requests))
        assert ["".join(delta.text for delta in answer) for answer in answers] == texts
        return texts

    assert on(url, "org/echo", work)


def test_a_message_that_is_none_gets_an_error_in_our_shape(url: str) -> None:
    import httpx

    for body in (b"", b"\xc1", b"\x80", b"{}"):
        answer = httpx.post(f"{url}/replica/generate?model=org/echo", content=body)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_without_a_key_the_replica_routes_are_closed(echo: EchoEngine) -> None:
    app = create_app(ServedModels([served("echo", echo)]), ServeSettings(api_keys=("sk-1",)))
    with running(app) as url:

        async def connect(key: str | None) -> None:
            await (await RemoteEngine.connect(url, "echo", key=key)).close()

        from mxn.errors import AuthError

        with pytest.raises(AuthError):
            asyncio.run(connect(None))
        asyncio.run(connect("sk-1"))


def _serve(port: int) -> None:
    engine = EchoEngine(token_s=0.02)
    run(create_app(ServedModels([served("echo", engine)])), port=port)


@contextlib.contextmanager
def server_process(port: int) -> Iterator[int]:
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def free_port() -> tuple[str, int]:
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    sock.close()
    return url, int(url.rpartition(":")[2])


async def connect_in_time(url: str) -> RemoteEngine:
    for _ in range(300):
        try:
            return await RemoteEngine.connect(url, "echo")
        except EngineDiedError:
            await asyncio.sleep(0.1)
    raise AssertionError("the server did not come up")


def test_a_killed_server_fails_its_streams_at_once_and_is_found_again() -> None:
    url, port = free_port()

    async def work() -> None:
        with server_process(port) as pid:
            engine = await connect_in_time(url)
            clock = asyncio.get_running_loop().time
            killed_s: list[float] = []

            async def read_and_kill() -> None:
                async for delta in engine.generate(ask("hello", max_tokens=500)):
                    if delta.completion_tokens == 3:
                        os.kill(pid, signal.SIGKILL)
                        killed_s.append(clock())

            with pytest.raises(EngineDiedError):
                await read_and_kill()
            assert clock() - killed_s[0] < 2.0
            assert not engine.is_healthy
        with server_process(port):
            for _ in range(300):
                if engine.is_healthy:
                    break
                await asyncio.sleep(0.1)
            assert len(await deltas_of(engine, ask("hello"))) == 8
            await engine.close()

    asyncio.run(work())


def test_a_key_that_was_changed_is_the_operators_matter(
    echo: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever sent the request has shown a good key; another replica answers."""
    app = create_app(ServedModels([served("echo", echo)]), ServeSettings(api_keys=("sk-new",)))

    async def work() -> None:
        engine = await RemoteEngine.connect(url, "echo", key="sk-new")
        await engine._http.close()
        engine._http = HttpClient(url, headers=[(b"authorization", b"Bearer sk-old")])
        with pytest.raises(EngineDiedError, match="refuses our key"):
            await deltas_of(engine, ask("hello"))
        assert not engine.is_healthy
        with pytest.raises(EngineDiedError):
            await engine.stats()
        other = EchoEngine()
        engine._is_healthy = True
        pool = PooledClient([Replica(id="far", client=engine), Replica(id="near", client=other)])
        got = [delta async for delta in pool.generate(ask("hello"))]
        assert "".join(delta.text for delta in got) == "hellohel"
        await pool.close()

    with running(app) as url:
        asyncio.run(work())
    told = [record.getMessage() for record in caplog.records if "our key" in record.getMessage()]
    assert told
    assert url in told[0]
    assert "sk-" not in caplog.text


class Adaptable(EchoEngine):
    """Takes note of the adapters it is told to load."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, str] = {}

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded:
        self.paths[request.name] = request.path
        return AdapterLoaded(request_id=request.request_id, adapters=tuple(self.paths))

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded:
        del self.paths[request.name]
        return AdapterLoaded(request_id=request.request_id, adapters=tuple(self.paths))


def load(name: str, path: Path | str) -> LoadAdapter:
    return LoadAdapter(request_id="l", name=name, path=str(path))


def unload(name: str) -> UnloadAdapter:
    return UnloadAdapter(request_id="u", name=name)


@contextlib.contextmanager
def adaptable(folder: Path | None, *scopes: str) -> Iterator[tuple[str, Adaptable]]:
    """A server whose every request comes with a key of these scopes; none: without keys."""
    engine = Adaptable()
    model = served("echo", engine)
    models = ServedModels([model])
    models.add_adapter(model.with_adapter("own"))
    app = create_app(models, ServeSettings(adapter_folder=str(folder) if folder else None))
    principal = Principal(
        key_id="k", org_id="o", project_id="p", scopes=cast("frozenset", frozenset(scopes))
    )

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext(principal=principal if scopes else None)
        await app({**scope, CONTEXT: context}, receive, send)

    with running(cast("Starlette", asked)) as url:
        yield url, engine


def test_a_replica_key_loads_from_the_operators_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    (folder / "a").mkdir(parents=True)
    with adaptable(folder, "replica") as (url, engine):

        async def work(remote: RemoteEngine) -> None:
            await remote.load_adapter(load("a", "a"))
            await remote.load_adapter(load("b", folder / "a"))
            for path in ("/etc", "../elsewhere", tmp_path):
                with pytest.raises(UserError, match="outside of the folder"):
                    await remote.load_adapter(load("c", path))
            await remote.unload_adapter(unload("b"))

        on(url, "echo", work)
        assert engine.paths == {"a": str(folder / "a")}


def test_what_the_server_serves_itself_is_neither_replaced_nor_unloaded(tmp_path: Path) -> None:
    with adaptable(tmp_path, "replica", "admin") as (url, engine):

        async def work(remote: RemoteEngine) -> None:
            with pytest.raises(UserError, match="served by this server itself"):
                await remote.load_adapter(load("own", tmp_path))
            with pytest.raises(UserError, match="served by this server itself"):
                await remote.unload_adapter(unload("own"))
            assert remote.is_healthy

        on(url, "echo", work)
        assert not engine.paths


def test_without_a_folder_a_replica_key_loads_nothing(tmp_path: Path) -> None:
    async def work(remote: RemoteEngine) -> None:
        await remote.load_adapter(load("a", tmp_path))

    with (
        adaptable(None, "replica") as (url, engine),
        pytest.raises(UserError, match="no scope 'admin'"),
    ):
        on(url, "echo", work)
    assert not engine.paths
    for scopes in (("replica", "admin"), ()):  # an admin's key, and a server without keys
        with adaptable(None, *scopes) as (url, engine):
            on(url, "echo", work)
            assert engine.paths == {"a": str(tmp_path)}
