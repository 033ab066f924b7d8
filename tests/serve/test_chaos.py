"""Random requests with cancellations, disconnects and bad bodies against a real server.

Holds afterwards: no 5xx, no stream that hangs, no request still running, no page still in use.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from support import tiny
from support.server import serving, write_tokenizer

AT_ONCE = 24
HANG_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny.write("qwen3", directory)
    write_tokenizer(directory, tiny.VOCAB)
    home = tmp_path_factory.mktemp("home")
    # A pool of few pages: preemption and waiting happen, not only the easy path.
    with serving(directory, home, "--kv-memory", "2MiB", "--max-sequences", "8") as url:
        yield url


def text(rng: random.Random, longest: int = 60) -> str:
    return "".join(rng.choice("abcdefgh XYZ,.!?\n") for _ in range(rng.randint(1, longest)))


def generation(rng: random.Random) -> dict[str, Any]:
    """Return a valid body's fields that say how to sample, in random combination."""
    options: dict[str, Any] = {
        "temperature": rng.choice([0, 0.5, 1.0, 2.0]),
        "top_p": rng.choice([1.0, 0.9, 0.1]),
        "seed": rng.randint(0, 2**31),
        "stop": rng.choice([None, "a", ["ab", "\n"], ["zzzz"]]),
        "presence_penalty": rng.choice([0, 1.5, -2]),
        "logit_bias": rng.choice([{}, {"7": 5}, {"9": -100}]),
        "top_k": rng.choice([0, 5]),
        "min_p": rng.choice([0, 0.1]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "n": rng.choice([1, 1, 1, 3]),
    }
    chosen = rng.sample(sorted(options), rng.randint(0, len(options)))
    return {"max_tokens": rng.randint(1, 40)} | {key: options[key] for key in chosen}


def chat_body(rng: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(rng)} for _ in range(rng.randint(1, 3))]
    body = {"model": "tiny", "messages": messages} | generation(rng)
    if rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    return body


def completion_body(rng: random.Random) -> dict[str, Any]:
    ids = [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randint(1, 80))]
    prompt = rng.choice([text(rng), [text(rng), text(rng)], ids, [ids, ids[:3] or [5]]])
    body = {"model": "tiny", "prompt": prompt} | generation(rng)
    if rng.random() < 0.3:
        body |= {"logprobs": rng.randint(0, 5), "echo": rng.random() < 0.5}
    return body


def spoil(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Return a body that is wrong in one of many ways, or right by luck."""
    junk: list[Any] = [None, -1, "x", [], {}, 1e308, True, [[[]]], "\ud83d", 2**70, "9" * 5000]
    key = rng.choice([*body, "stream", "stream_options", "tools", "response_format"])
    encoded = json.dumps(body | {key: rng.choice(junk)}).encode()
    kind = rng.randrange(4)
    if kind == 0:
        return encoded[: rng.randrange(len(encoded))]
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))
    if kind == 2:
        return json.dumps({k: v for k, v in body.items() if k != key}).encode()
    return encoded


Action = Callable[[httpx.AsyncClient, random.Random, Counter], Awaitable[None]]


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    if rng.random() < 0.5:
        return "/v1/chat/completions", chat_body(rng)
    return "/v1/completions", completion_body(rng)


async def answer_in_one_piece(http: httpx.AsyncClient, rng: random.Random, seen: Counter) -> None:
    path, body = request(rng)
    response = await http.post(path, json=body)
    seen[response.status_code] += 1
    assert response.status_code == 200, response.text
    assert all(choice["finish_reason"] for choice in response.json()["choices"])


async def whole_stream(http: httpx.AsyncClient, rng: random.Random, seen: Counter) -> None:
    path, body = request(rng)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=body) as response:
        seen[response.status_code] += 1
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert not any("error" in event for event in events)
    assert events[-1]["usage"]["completion_tokens"] >= 1


async def broken_stream(http: httpx.AsyncClient, rng: random.Random, seen: Counter) -> None:
    """Read a few events, then close the connection."""
    path, body = request(rng)
    left = rng.randint(0, 6)
    async with http.stream("POST", path, json=body | {"stream": True}) as response:
        seen[response.status_code] += 1
        assert response.status_code == 200, await response.aread()
        async for _ in response.aiter_lines():
            left -= 1
            if left <= 0:
                break
    seen["stream dropped"] += 1


async def gone_before_the_answer(
    http: httpx.AsyncClient, rng: random.Random, seen: Counter
) -> None:
    path, body = request(rng)
    task = asyncio.create_task(http.post(path, json=body | {"max_tokens": 60}))
    await asyncio.sleep(rng.random() * 0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    seen["client gone"] += 1


async def half_a_body(http: httpx.AsyncClient, rng: random.Random, seen: Counter) -> None:
    """Announce a body, send a part of it, hang up."""
    path, body = request(rng)
    encoded = json.dumps(body).encode()
    address = urlsplit(str(http.base_url))
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(encoded)}\r\n\r\n"
    writer.write(head.encode() + encoded[: rng.randrange(len(encoded))])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    seen["half a body"] += 1


async def bad_body(http: httpx.AsyncClient, rng: random.Random, seen: Counter) -> None:
    path, body = request(rng)
    headers = {"content-type": "application/json"}
    response = await http.post(path, content=spoil(rng, body), headers=headers)
    seen[response.status_code] += 1
    assert response.status_code < 500, response.text
    if response.status_code != 200 and response.headers["content-type"] == "application/json":
        assert set(response.json()["error"]) >= {"message", "type", "param", "code"}


async def what_the_model_cannot_do(
    http: httpx.AsyncClient, rng: random.Random, seen: Counter
) -> None:
    path, body = rng.choice(
        [
            ("/v1/embeddings", {"model": "tiny", "input": "x"}),
            ("/v1/rerank", {"model": "tiny", "query": "q", "documents": ["a"]}),
            ("/v1/completions", {"model": "nobody", "prompt": "x"}),
            ("/v1/completions", {"model": "tiny", "prompt": [5] * 100_000}),
            ("/v1/completions", {"model": "tiny", "prompt": [tiny.VOCAB + 7]}),
            ("/v1/no/such/path", {}),
        ]
    )
    response = await http.post(path, json=body)
    seen[response.status_code] += 1
    assert 400 <= response.status_code < 500, (path, response.text)


ACTIONS: list[tuple[Action, int]] = [
    (answer_in_one_piece, 4), (whole_stream, 4), (broken_stream, 4), (gone_before_the_answer, 3),
    (half_a_body, 1), (bad_body, 3), (what_the_model_cannot_do, 1),
]  # fmt: skip


async def storm(url: str, num_requests: int) -> Counter:
    rng = random.Random(20261121)
    kinds = [action for action, weight in ACTIONS for _ in range(weight)]
    seen: Counter = Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S, limits=limits) as http:

        async def one(action: Action, seed: int) -> None:
            async with gate:
                await asyncio.wait_for(action(http, random.Random(seed), seen), HANG_S)

        await asyncio.gather(*(one(rng.choice(kinds), seed) for seed in range(num_requests)))
    return seen


async def settled_load(url: str) -> dict[str, Any]:
    """Return the load once the server has seen the last disconnects, or after ten seconds."""
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in range(100):
            load = (await http.get("/load")).json()["models"]["tiny"]
            if not (load["running"] or load["waiting"] or load["kv_pages_used"]):
                return load
            await asyncio.sleep(0.1)
    return load


@pytest.mark.timeout(280)
@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_requests_leave_nothing_behind(server, count):
    seen = asyncio.run(storm(server, count))
    print(dict(seen))
    assert not [code for code in seen if isinstance(code, int) and code >= 500], seen
    assert seen[200] > count / 3
    assert seen["stream dropped"] > count / 20
    load = asyncio.run(settled_load(server))
    assert (load["running"], load["waiting"], load["kv_pages_used"]) == (0, 0, 0)
    # It still works, and a request that met no fault gives the same answer twice.
    body = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 16}
    answers = [httpx.post(f"{server}/v1/completions", json=body).json() for _ in range(2)]
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
