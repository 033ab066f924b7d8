"""The official `openai` client, unchanged, against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import struct

import httpx
import openai
import pytest


@pytest.fixture
def client(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


CHAT = {"model": "echo", "messages": [{"role": "user", "content": "héllo"}]}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["echo", "org/echo", "embed", "broken"]
    assert client.models.retrieve("org/echo").owned_by == "mxn"
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("nope")
    assert info.value.code == "model_not_found"


def test_chat(client):
    answer = client.chat.completions.create(**CHAT, max_tokens=20)
    assert answer.choices[0].message.content == "héllo"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id


def test_chat_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(**CHAT, stream=True, stream_options=options)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "héllo"
    assert chunks[-1].usage.completion_tokens == 8


def test_stream_helper_joins_events(client):
    with client.chat.completions.stream(**CHAT, max_tokens=20) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "héllo"


def test_logprobs(client):
    answer = client.chat.completions.create(**CHAT, max_tokens=3, logprobs=True, top_logprobs=2)
    [first, *_] = answer.choices[0].logprobs.content
    assert bytes(first.bytes).decode() == first.token
    assert first.top_logprobs[0].logprob == first.logprob


def test_completions(client):
    answer = client.completions.create(model="echo", prompt=[97, 98], max_tokens=2, logprobs=1)
    assert answer.choices[0].text == "ab"
    assert len(answer.choices[0].logprobs.tokens) == 2
    stream = client.completions.create(model="echo", prompt="ab", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abab"


def test_extras_go_through_extra_body(client):
    extra = {"top_k": 5, "min_p": 0.1, "no_such_field": 1}
    assert client.chat.completions.create(**CHAT, max_tokens=1, extra_body=extra).choices
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(**CHAT, extra_body={"top_k": "many"})
    assert info.value.param == "top_k"


def test_embeddings_with_the_default_base64_and_with_floats(client):
    coded = client.embeddings.create(model="embed", input=["a", "b"])
    plain = client.embeddings.create(model="embed", input=["a", "b"], encoding_format="float")
    for one, other in zip(coded.data, plain.data, strict=True):
        assert struct.pack("<8f", *one.embedding) == struct.pack("<8f", *other.embedding)


def test_errors_become_the_right_exceptions(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**CHAT | {"model": "nope"})
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(**CHAT, temperature=3)
    assert info.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(**CHAT, max_tokens=5000)
    assert info.value.code == "context_length_exceeded"


def test_error_in_mid_stream_raises(client):
    stream = client.chat.completions.create(**CHAT | {"model": "broken"}, stream=True)
    with pytest.raises(openai.APIError, match="died"):
        list(stream)


def test_async_client_runs_many_streams_at_once(server_url):
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": f"text {number}"}]
        stream = await client.chat.completions.create(model="echo", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    assert asyncio.run(all_of_them()) == [f"text {number}" for number in range(32)]


def test_keep_alive_connection_survives_errors_and_streams(server_url):
    with httpx.Client(base_url=server_url) as client:
        for _ in range(3):
            assert client.post("/v1/chat/completions", content=b"{").status_code == 400
            assert client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
            assert client.get("/nope").status_code == 404
