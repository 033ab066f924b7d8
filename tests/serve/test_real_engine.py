"""The API over a real engine process with a tiny real model: what the echo cannot prove."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import httpx
import openai
import pytest

from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
from mxn.engine.echo import byte_tokenizer
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
LIMIT_S = 60.0


def wait_for(condition, what):
    """Poll, because another process decides when."""
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def engine_and_url(forked_engines):
    config = EngineConfig(
        model="tiny?step_s=0.003", loader="mxn.engine.testing:load_tiny", threads=1
    )
    engines = []

    async def load(models: ServedModels) -> None:
        engine = await ProcessEngine.start(config)
        engines.append(engine)
        tokenizer = byte_tokenizer(chat_template=TEMPLATE)
        models.add(ServedModel(name="tiny", client=engine, tokenizer=tokenizer))

    models = ServedModels()
    models.expect("tiny")
    with running(create_app(models, startup=load)) as url:
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, "the model is ready")
        yield engines[0], url


@pytest.fixture
def url(engine_and_url):
    return engine_and_url[1]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=LIMIT_S) as client:
        yield client


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def is_idle(http):
    load = http.get("/load").json()["models"]["tiny"]
    return (load["running"], load["waiting"], load["kv_pages_used"]) == (0, 0, 0)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "héllo"}]}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_stream_equals_the_whole_answer(client, sampling):
    fields = CHAT | sampling | {"max_tokens": 40}
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    usage, want = chunks[-1].usage, whole.usage
    assert usage.completion_tokens == want.completion_tokens
    assert usage.prompt_tokens == want.prompt_tokens


def test_loglikelihood_call_of_lm_eval(client):
    ids = list(b"hello world")
    answer = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(ids) + 1
    assert "".join(logprobs.tokens[: len(ids)]) == "hello world"
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    for value, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert value <= max(top.values()) <= 0

    scored = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=0, logprobs=1, echo=True, temperature=0
    )
    assert scored.choices[0].text == "hello world"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(
        logprobs.token_logprobs[:-1], abs=1e-4
    )


def test_n_choices_repeat_with_their_seeds(client):
    fields = {"model": "tiny", "prompt": "abc", "n": 3, "seed": 11, "max_tokens": 8}
    first, second = (client.completions.create(**fields) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    alone = client.completions.create(**fields | {"n": 1, "seed": 12})
    assert alone.choices[0].text == first.choices[1].text


def test_refusals_come_before_the_engine(http):
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 100_000})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": [258]})
    assert response.status_code == 400


def drop(url, body):
    """Send a request and leave: at the first line of a stream, or before a whole answer."""
    with (
        contextlib.suppress(httpx.TimeoutException),
        httpx.Client(base_url=url, timeout=0.05) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        next(response.iter_lines())


def test_dropped_clients_leave_nothing_behind(http, url):
    for fields in ({"stream": True}, {}, {"n": 3}, {"n": 3, "stream": True}):
        drop(url, CHAT | {"ignore_eos": True} | fields)
    wait_for(lambda: is_idle(http), "the engine is idle again")
    assert 'finished_reason="client_gone",model_name="tiny"}' in http.get("/metrics").text


def test_crash_in_mid_stream_is_told_and_the_next_engine_answers(engine_and_url, http):
    engine, _ = engine_and_url
    body = CHAT | {"ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(engine.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    response = http.post("/v1/chat/completions", json=CHAT)
    if response.status_code != 200:  # the restart may already be done
        assert response.status_code == 503
        assert response.headers["retry-after"]
    wait_for(lambda: http.get("/health").status_code == 200, "the engine is restarted")
    assert http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4}).status_code == 200
    assert is_idle(http)
