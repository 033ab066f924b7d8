"""A client that goes away stops its work at once, streamed or not. No sleeping: events decide."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mxn.engine.echo import EchoEngine

LONG = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4000}


class Client:
    """Speaks ASGI by hand: sends a body, and closes when told."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self._parts = [{"type": "http.request", "body": json.dumps(body).encode()}]
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.got_data = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.got_data.set()


async def wait_until(condition) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never came true")


def drop(app, path, body, engine, *, after_data=False):
    """Send a request, close when it runs (or has sent data), return what was sent."""

    async def scenario() -> list[dict[str, Any]]:
        client = Client(path, body)
        task = asyncio.create_task(app(client.scope, client.receive, client.send))
        if after_data:
            await asyncio.wait_for(client.got_data.wait(), 5)
        else:
            await wait_until(lambda: engine._running)
        client.gone.set()
        await asyncio.wait_for(task, 5)
        stats = await engine.stats() if engine.is_healthy else None
        assert stats is not None
        assert stats.num_running == 0
        assert stats.kv_pages_used == 0
        return client.sent

    return asyncio.run(scenario())


@pytest.mark.parametrize("n", [1, 3])
def test_whole_answer_is_cancelled(make_api, n):
    engine = EchoEngine(first_token_s=3600)
    api = make_api(engine)
    drop(api.app, "/v1/chat/completions", LONG | {"n": n}, engine)
    assert asyncio.run(engine.stats()).requests_cancelled_total == n


@pytest.mark.parametrize("n", [1, 3])
def test_stream_is_cancelled_before_its_first_token(make_api, n):
    engine = EchoEngine(first_token_s=3600)
    api = make_api(engine)
    sent = drop(api.app, "/v1/chat/completions", LONG | {"n": n, "stream": True}, engine)
    assert sent == [], "headers wait for the first token"
    assert asyncio.run(engine.stats()).requests_cancelled_total == n


@pytest.mark.parametrize("n", [1, 3])
def test_stream_is_cancelled_in_the_middle(make_api, n):
    engine = EchoEngine(token_s=3600)
    api = make_api(engine)
    body = LONG | {"n": n, "stream": True}
    sent = drop(api.app, "/v1/chat/completions", body, engine, after_data=True)
    assert sent[0]["type"] == "http.response.start"
    assert asyncio.run(engine.stats()).requests_cancelled_total == n


def test_prompts_of_one_completion_are_all_cancelled(make_api):
    engine = EchoEngine(first_token_s=3600)
    api = make_api(engine)
    drop(api.app, "/v1/completions", {"model": "echo", "prompt": ["a", "b"], "n": 2}, engine)
    assert asyncio.run(engine.stats()).requests_cancelled_total == 4


def test_dropped_requests_are_counted_as_client_gone(make_api):
    engine = EchoEngine(first_token_s=3600)
    api = make_api(engine)
    drop(api.app, "/v1/chat/completions", LONG, engine)
    text = api.get("/metrics").text
    assert 'mxn_request_success_total{finished_reason="client_gone",model_name="echo"} 1.0' in text


def test_embedding_is_cancelled(make_api):
    api = make_api()
    engine = api.app.state.mxn.models.get("embed").client
    engine.first_token_s = 3600
    drop(api.app, "/v1/embeddings", {"model": "embed", "input": "a"}, engine)


def test_one_failing_choice_cancels_the_others(make_api):
    class FailsOne(EchoEngine):
        async def generate(self, request):
            if request.request_id.endswith("-1"):
                raise ValueError("boom")
            async for delta in super().generate(request):
                yield delta

    engine = FailsOne(first_token_s=3600)
    assert make_api(engine).chat(n=3).status_code == 500
    assert asyncio.run(engine.stats()).num_running == 0


def test_silent_stream_sends_comments(make_api):
    from mxn.serve.settings import ServeSettings

    engine = EchoEngine(first_token_s=3600)
    api = make_api(engine, settings=ServeSettings(heartbeat_s=0.01))
    body = LONG | {"stream": True}
    sent = drop(api.app, "/v1/chat/completions", body, engine, after_data=True)
    assert sent[0]["type"] == "http.response.start"
    assert sent[1]["body"] == b": ping\n\n"
