"""An app over echo replicas, in process and behind a real server on a loopback port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mxn.engine.echo import EchoEngine
from mxn.serve.app import create_app
from mxn.serve.served import GenerationDefaults, ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.settings import ServeSettings


def serve_echo(name: str, engine: EchoEngine, **options: Any) -> ServedModel:
    return ServedModel(name=name, client=engine, tokenizer=engine.tokenizer, **options)


class Api:
    """Calls an app in process; every call is one event loop, so nothing is shared by accident."""

    def __init__(self, app: Any, engine: EchoEngine) -> None:
        self.app = app
        self.engine = engine

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def chat(self, content: str = "hello", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"model": "echo", "messages": messages} | fields)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "echo", "prompt": prompt} | fields)


MakeApi = Callable[..., Api]


@pytest.fixture
def make_api() -> MakeApi:
    def make(
        engine: EchoEngine | None = None,
        *,
        settings: ServeSettings | None = None,
        defaults: GenerationDefaults | None = None,
        is_alone: bool = False,
    ) -> Api:
        engine = engine or EchoEngine()
        models = ServedModels(
            [serve_echo("echo", engine, defaults=defaults or GenerationDefaults())]
        )
        if not is_alone:
            models.add(serve_echo("embed", EchoEngine(kind="embedder")))
            models.add(serve_echo("rank", EchoEngine(kind="reranker")))
        return Api(create_app(models, settings), engine)

    return make


@pytest.fixture
def api_of() -> Callable[[Any], Api]:
    """For apps that a test builds itself."""
    return lambda app: Api(app, EchoEngine())


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api()


@pytest.fixture(scope="module")  # "broken" dies for good, so no two modules share it
def server_url() -> Iterator[str]:
    models = ServedModels(
        [
            serve_echo("echo", EchoEngine(), aliases=("org/echo",)),
            serve_echo("embed", EchoEngine(kind="embedder")),
            serve_echo("broken", EchoEngine(dies_after=3)),
        ]
    )
    with running(create_app(models)) as url:
        yield url


def sse_events(response: httpx.Response) -> list[Any]:
    """Return the events of a finished stream as objects, checking the framing on the way."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == "", "the stream ends with an empty line"
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.fixture
def events() -> Callable[[httpx.Response], list[Any]]:
    return sse_events
