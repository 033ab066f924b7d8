"""An OpenAI-compatible server as a replica over token ids; our own server plays the foreign one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, cast

import httpx
import msgspec
import pytest

from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import Delta, Encode, Generate, SamplingParams
from mxn.errors import ConfigError, EngineDiedError, UnsupportedError
from mxn.serve.app import create_app
from mxn.serve.fleet import Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.replicas.compat_answer import Chunk, Made
from mxn.serve.replicas.openai_compat import CompatConfig, CompatEngine
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running


@pytest.fixture
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def url(echo: EchoEngine) -> Iterator[str]:
    vectors = EchoEngine(kind="embedder")
    models = ServedModels(
        [
            ServedModel(name="echo", client=echo, tokenizer=echo.tokenizer),
            ServedModel(name="embed", client=vectors, tokenizer=vectors.tokenizer),
        ]
    )
    with running(create_app(models)) as url:
        yield url


def ask(text: str, **more: Any) -> Generate:
    resume = more.pop("resume_ids", [])
    params = SamplingParams(**({"temperature": 0, "max_tokens": 8} | more))
    return Generate(
        request_id="r", prompt_ids=list(text.encode()), sampling=params, resume_ids=resume
    )


def on(url: str, work: Any, **config: Any) -> Any:
    async def go() -> Any:
        tokenizer = EchoEngine().tokenizer
        options: dict[str, Any] = {"url": url, "model": "echo"} | config
        engine = await CompatEngine.connect(CompatConfig(**options), tokenizer)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


async def deltas_of(engine: CompatEngine, request: Generate) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def test_a_foreign_server_tells_what_it_is(url: str) -> None:
    async def work(engine: CompatEngine) -> Any:
        return engine.info, engine.count_basis, engine.is_healthy

    info, basis, is_healthy = on(url, work)
    assert (info.family, info.max_context, info.kind) == ("mxn", 4096, "decoder")
    assert basis == "counted"
    assert is_healthy


def test_text_ids_and_counts_are_those_of_the_engine_behind_it(url: str) -> None:
    deltas = cast("list[Delta]", on(url, lambda engine: deltas_of(engine, ask("hello"))))
    assert "".join(delta.text for delta in deltas) == "hellohel"
    assert [item for delta in deltas for item in delta.token_ids] == list(b"hellohel")
    last = deltas[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", 5, 8)


def test_a_resumed_request_continues_and_its_first_delta_has_all_the_text(
    url: str, echo: EchoEngine
) -> None:
    request = ask("abc", resume_ids=list(b"abca"), max_tokens=6)
    deltas = on(url, lambda engine: deltas_of(engine, request))
    assert cast("Generate", echo.seen[-1]).prompt_ids == list(b"abcabca")
    assert deltas[0].text.startswith("abca")
    assert sum(len(delta.token_ids) for delta in deltas) == 2
    assert deltas[-1].completion_tokens == 6


def test_stop_strings_and_vectors_go_through(url: str) -> None:
    deltas = on(url, lambda engine: deltas_of(engine, ask("one two", stop=("two",))))
    assert "".join(delta.text for delta in deltas) == "one "
    assert deltas[-1].finish_reason == "stop"
    request = Encode(request_id="e", sequences=[[1, 2, 3], [4]])
    config = {"model": "embed", "is_embedder": True}
    got = on(url, lambda engine: engine.encode(request), **config)
    assert got == asyncio.run(EchoEngine(kind="embedder").encode(request))


def test_what_the_server_cannot_do_is_refused_and_not_left_out(url: str) -> None:
    with pytest.raises(UnsupportedError, match="min_p"):
        on(url, lambda engine: deltas_of(engine, ask("x", min_p=0.5)), kind="openai")
    with pytest.raises(UnsupportedError, match="logprobs"):
        on(url, lambda engine: deltas_of(engine, ask("x", logprobs=1)))


def test_an_unknown_model_and_a_dead_server_are_told_apart(url: str) -> None:
    async def nothing(engine: CompatEngine) -> None: ...

    with pytest.raises(ConfigError, match="has no model 'other'; it has 'echo'"):
        on(url, nothing, model="other")
    with pytest.raises(EngineDiedError, match="takes no connections"):
        on("http://127.0.0.1:9", nothing)


def test_a_server_that_dies_in_mid_stream_is_a_died_engine(url: str, echo: EchoEngine) -> None:
    echo.dies_after = 3
    with pytest.raises(EngineDiedError):
        on(url, lambda engine: deltas_of(engine, ask("hello")))


def test_ids_of_the_server_make_the_text_also_across_a_resume() -> None:
    tokenizer = EchoEngine().tokenizer
    ids = list("né🙂".encode())
    request = ask("x", resume_ids=ids[:2], max_tokens=10)
    made = Made(request, tokenizer, knows_ids=True)
    text = ""
    for token_id in ids[2:]:  # cut in the middle of é; what the server shows does not matter
        raw = {"choices": [{"text": "\ufffd", "token_ids": [token_id]}]}
        chunk = msgspec.json.decode(json.dumps(raw), type=Chunk)
        delta = made.push(chunk)
        assert delta is not None
        assert delta.token_ids == [token_id]
        text += delta.text
    assert text == "né🙂"


def test_our_own_server_answers_what_a_probe_asks(url: str) -> None:
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert cards[0]["owned_by"] == "mxn"
    assert cards[0]["max_model_len"] == 4096


class Canned:
    """A foreign server that sends events as they are, then resets the connection."""

    def __init__(self, *events: Any, **config: Any) -> None:
        self.events = events
        self.num_asked = 0
        self.config = config

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.num_asked += 1
        head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99999\r\n\r\n"
        )
        body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in self.events)
        writer.write(head + body)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()

    def collect(self, request: Generate) -> list[Delta]:
        async def go() -> list[Delta]:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            options: dict[str, Any] = {"kind": "openai", "max_context": 100} | self.config
            config = CompatConfig(url=f"http://127.0.0.1:{port}", model="m", **options)
            engine = CompatEngine(config, EchoEngine().tokenizer)
            try:
                return await deltas_of(engine, request)
            finally:
                await engine.close()
                server.close()

        return asyncio.run(go())


def said(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason, **more}]}


def test_a_server_lost_after_the_finish_reason_has_answered() -> None:
    deltas = Canned(said("Hello."), said("", "stop")).collect(ask("x"))
    assert "".join(delta.text for delta in deltas) == "Hello."
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("stop", 6)
    with pytest.raises(EngineDiedError):
        Canned(said("Hello.")).collect(ask("x"))


@pytest.mark.parametrize("kind", ["openai", "vllm"])
def test_an_answer_that_was_at_its_limit_is_ended_without_a_request(kind: str) -> None:
    server = Canned(said("more"), kind=kind)
    request = ask("x", resume_ids=list(b"abcdef"), max_tokens=6)
    [delta] = server.collect(request)
    assert server.num_asked == 0
    assert (delta.text, delta.token_ids) == ("abcdef", [])
    assert (delta.finish_reason, delta.completion_tokens) == ("length", 6)


@pytest.mark.parametrize(
    "event",
    [
        said("a", token_ids=[-1]),
        said("a", token_ids=[2**63]),
        said("a", token_ids=[97], logprobs={"tokens": ["odd"], "token_logprobs": [0.0]}),
        said("a", token_ids=[97], logprobs={}),
        {"choices": [{"text": 5}]},
        {"choices": [{"text": "a", "delta": [1]}]},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_a_died_engine(event: dict[str, Any]) -> None:
    with pytest.raises(EngineDiedError):
        Canned(event, kind="vllm").collect(ask("x", logprobs=1))


@pytest.mark.parametrize(
    ("kind", "resumes", "wish", "reason"),
    [
        ("openai", False, {"top_k": 5}, "no parameter 'top_k'"),
        ("vllm", False, {"top_k": 5, "frequency_penalty": 1.0, "stop": ("x",)}, None),
        ("vllm", True, {"frequency_penalty": 1.0}, "begin 'frequency_penalty' anew"),
        ("vllm", True, {"stop": ("x",), "repetition_penalty": 1.1, "min_tokens": 3}, None),
        ("sglang", True, {"repetition_penalty": 1.1}, "begin 'repetition_penalty' anew"),
        ("sglang", True, {"stop": ("x",)}, "begin 'stop' anew"),
        ("openai", True, {"seed": 1, "logit_bias": {3: 1.0}}, None),
    ],
)
def test_a_replica_says_beforehand_what_it_cannot_take(
    kind: Any, resumes: bool, wish: dict[str, Any], reason: str | None
) -> None:
    config = CompatConfig(url="http://127.0.0.1:9", model="m", kind=kind, max_context=9)

    async def go() -> str | None:
        return CompatEngine(config, EchoEngine().tokenizer).lacks(ask("x", **wish), resumes=resumes)

    said = asyncio.run(go())
    assert (said is None) if reason is None else (said is not None and reason in said)


def test_in_a_mixed_pool_a_parameter_decides_who_answers(url: str) -> None:
    """The foreign server would refuse; the native replica beside it is asked."""
    native = EchoEngine()
    wish = ask("hello", min_p=0.5)

    async def work(foreign: CompatEngine) -> str:
        pool = PooledClient([Replica(id=f"r{at}", client=foreign) for at in range(5)])
        with pytest.raises(UnsupportedError, match="min_p"):
            await anext(aiter(pool.generate(wish)))
        pool.add(Replica(id="native", client=native))
        text = "".join([delta.text async for delta in pool.generate(wish)])
        await pool.close()
        return text

    assert on(url, work, kind="openai") == "hellohel"
    assert len(native.seen) == 1
