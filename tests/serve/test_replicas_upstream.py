"""Foreign servers behind mxn: passed through, counted, retried, continued, and never mixed up."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.engine.echo import EchoEngine
from mxn.serve.app import create_app
from mxn.serve.replicas.sse import MalformedStream, Renamer, SseReader
from mxn.serve.replicas.upstream import UpstreamConfig
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from support.foreign import (
    COMPLETION,
    WORDS,
    Fake,
    ask,
    chunk,
    fakes,
    gateway,
    lost_after,
    sse,
    stream_of,
    text_of,
    whole,
)


def test_a_whole_answer_gets_our_name_and_keeps_what_we_do_not_know() -> None:
    with fakes(lambda body: [whole(COMPLETION)]) as [fake], gateway(fake) as (client, book):
        answer = ask(client).json()
        assert answer["model"] == "m"
        assert answer["id"].startswith("chatcmpl-")
        assert answer["odd"] == {"id": "up-1"}
        assert fake.bodies[0]["model"] == "up"
        assert fake.bodies[0]["odd_field"] == [1, None]
        settled = book.settled[answer["id"]]
    assert (settled.reason, settled.basis) == ("complete", "server")
    assert (settled.input_tokens, settled.output_tokens, settled.chip) == (5, 4, "c1")


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_stream_is_passed_on_and_usage_is_always_asked_for(events, wants_usage: bool) -> None:
    with fakes(lambda body: [sse(stream_of(WORDS))]) as [fake], gateway(fake) as (client, book):
        more = {"stream_options": {"include_usage": True}} if wants_usage else {}
        got = events(ask(client, stream=True, **more))
        assert fake.bodies[0]["stream_options"] == {"include_usage": True}
    assert text_of(got) == "".join(WORDS)
    assert {item["model"] for item in got} == {"m"}
    assert len({item["id"] for item in got}) == 1
    assert (got[-1].get("usage") is not None) == wants_usage
    assert (book.only().output_tokens, book.only().reason) == (4, "complete")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_split_of_the_bytes_gives_the_same_events(data: st.DataObject) -> None:
    ending = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    raw = (b": ping\n\n" + stream_of(WORDS)).replace(b"\n", ending)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    reader, renamer, out, is_done = SseReader(), Renamer("new", "m"), b"", False
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        batch = reader.feed(raw[start:end])
        assert batch.problem is None
        is_done = is_done or batch.is_done
        out += renamer.rename(batch)
    assert is_done
    got = [json.loads(block[6:]) for block in out.decode().split("\n\n") if block]
    assert text_of(got) == "".join(WORDS)
    assert {(item["id"], item["model"]) for item in got} == {("new", "m")}


def test_every_piece_of_utf8_arrives_whole(events) -> None:
    raw = sse(stream_of(WORDS))
    pieces = [raw[at : at + 1] for at in range(len(raw))]
    with fakes(lambda body: pieces) as [fake], gateway(fake) as (client, _):
        assert text_of(events(ask(client, stream=True))) == "".join(WORDS)


def test_an_upstream_without_usage_is_counted_by_events(events) -> None:
    script = lambda body: [sse(stream_of(WORDS, has_usage=False))]  # noqa: E731
    with fakes(script) as [fake], gateway(fake) as (client, book):
        events(ask(client, stream=True))
    assert (book.only().basis, book.only().output_tokens) == ("events", 4)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_the_callers_mistakes_come_back_in_the_servers_words(status: int) -> None:
    error = {"error": {"message": "bad thing", "type": "t", "param": "p", "code": "c"}}
    script = lambda body: [whole(json.dumps(error).encode(), status)]  # noqa: E731
    with fakes(script) as [fake], gateway(fake) as (client, book):
        for stream in (False, True):
            answer = ask(client, stream=stream)
            assert answer.status_code == status
            assert answer.json() == error
    assert {item.reason for item in book.settled.values()} == {"error"}
    assert {item.input_tokens for item in book.settled.values()} == {0}


@pytest.mark.parametrize("bad", ["429", "503", "reset", "refused", "half", "garbage", "html"])
@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_byte_another_server_answers(events, bad: str, stream: bool) -> None:
    failure = {
        "429": [whole(b'{"error":"busy"}', 429, b"retry-after: 1\r\n")],
        "503": [whole(b"", 503)],
        "reset": [],
        "half": [sse(stream_of(WORDS)[:30]) if stream else whole(COMPLETION)[:-20]],
        "garbage": [b"\x16\x03\x01 nonsense\r\n\r\n"],
        "html": [whole(b"<html>gateway</html>", 502)],
        "refused": [],
    }[bad]
    good = lambda body: [sse(stream_of(WORDS)) if body.get("stream") else whole(COMPLETION)]  # noqa: E731
    with fakes(lambda body: failure, good) as [first, second]:
        configs: list[UpstreamConfig | Fake] = [first, second]
        if bad == "refused":
            configs[0] = UpstreamConfig(url="http://127.0.0.1:9", model="up")
        with gateway(*configs) as (client, book):
            answer = ask(client, stream=stream)
            assert answer.status_code == 200
            if stream:
                assert text_of(events(answer)) == "".join(WORDS)
            else:
                assert answer.json()["choices"][0]["message"]["content"] == "hey"
            assert ask(client, stream=stream).status_code == 200
    assert len(second.bodies) == 2
    assert len(first.bodies) <= 1, "a server that failed is left alone for a while"
    assert {item.reason for item in book.settled.values()} == {"complete"}


@pytest.mark.parametrize("how", ["lost", "malformed", "error", "silent"])
def test_in_mid_stream_another_server_goes_on(events, how: str) -> None:
    broken = sse(stream_of(WORDS[:2], has_end=False))
    after: list[bytes | float] = {
        "lost": [],
        "malformed": [b"data: {nonsense\n\n"],
        "error": [b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'],
        "silent": [5.0],
    }[how]
    with (
        fakes(lambda body: [broken, *after], lambda body: [sse(stream_of(WORDS[2:]))]) as found,
        gateway(*found) as (client, book),
    ):
        got = events(ask(client, stream=True, max_tokens=10))
    body = found[1].bodies[0]
    assert text_of(got) == "".join(WORDS)
    assert len({item["id"] for item in got}) == 1
    roles = [item for item in got if item["choices"] and "role" in item["choices"][0]["delta"]]
    assert len(roles) == 1
    assert body["messages"][-1] == {"role": "assistant", "content": "".join(WORDS[:2])}
    assert body["continue_final_message"] is True
    assert body["max_tokens"] == 8
    assert book.only().num_replicas == 2


def test_without_another_server_a_broken_stream_ends_with_an_error_event() -> None:
    broken = sse(stream_of(WORDS[:2], has_end=False))
    with fakes(lambda body: [broken]) as [fake], gateway(fake) as (client, book):
        answer = ask(client, stream=True)
    blocks = answer.text.strip().split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    assert json.loads(blocks[-2][6:])["error"]["code"] == "engine_unavailable"
    assert (book.only().reason, book.only().output_tokens) == ("replica_lost", 2)


def test_a_client_that_leaves_closes_the_upstream_and_pays_for_what_it_got() -> None:
    script = lambda body: [sse(stream_of(WORDS[:2], has_end=False)), 10.0]  # noqa: E731
    with fakes(script) as [fake], gateway(fake) as (client, book):
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_bytes())
        for _ in range(200):
            if book.settled and fake.num_gone:
                break
            threading.Event().wait(0.02)
        assert fake.num_gone == 1
    assert (book.only().reason, book.only().output_tokens) == ("client_gone", 2)


def test_a_silent_stream_breathes_and_a_slow_loris_is_given_up() -> None:
    head = sse(stream_of(WORDS[:1], has_end=False))
    script = lambda body: [head, *([0.3, b": x\n"] * 2), 10.0]  # noqa: E731
    with fakes(script) as [fake], gateway(fake, heartbeat_s=0.2) as (client, book):
        answer = ask(client, stream=True)
    assert ": ping" in answer.text
    assert "sent nothing for 1 s" in answer.text
    assert book.only().reason == "replica_lost"


def test_mxn_behind_mxn_keeps_text_and_counts(events) -> None:
    echo = EchoEngine()
    inner = create_app(
        ServedModels([ServedModel(name="echo", client=echo, tokenizer=echo.tokenizer)])
    )
    with (
        running(inner) as url,
        gateway(UpstreamConfig(url=url, model="echo", kind="mxn")) as (client, book),
    ):
        direct = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
        ).json()
        answer = ask(client, max_tokens=9).json()
        assert answer["choices"] == direct["choices"]
        assert answer["usage"] == direct["usage"]
        got = events(ask(client, max_tokens=9, stream=True))
        assert text_of(got) == direct["choices"][0]["message"]["content"]
    made = direct["usage"]["completion_tokens"]
    assert {item.output_tokens for item in book.settled.values()} == {made}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": SCHEMA},
        {"structured_outputs": {"regex": "[a-z]+"}},
        {"guided_json": {"type": "object"}},
        {"grammar": 'root ::= "a"'},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"stop": [" 世界!"]},
        {"stop": " 世界!"},
        {"min_tokens": 9},
        {"logprobs": True},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_what_acts_on_the_whole_answer_is_not_continued(field: dict[str, Any]) -> None:
    first = lost_after(stream_of(WORDS[:2], has_end=False))
    second = lambda body: [sse(stream_of(WORDS[2:]))]  # noqa: E731
    with fakes(first, second) as found, gateway(*found) as (client, book):
        answer = ask(client, stream=True, **field)
    error = json.loads(answer.text.strip().split("\n\n")[-2][6:])["error"]
    assert error["code"] == "engine_unavailable"
    assert next(iter(field)) in json.dumps(error)
    assert not found[1].bodies, "the second server must not be asked"
    assert book.only().reason == "replica_lost"


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "text"}, "tool_choice": "auto", "logprobs": False},
        {"temperature": 0, "seed": 3, "logit_bias": {"5": 1}, "frequency_penalty": 0},
        {"stop": ["界 x", "END"], "min_tokens": 0, "repetition_penalty": 1.0},
    ],
    ids=str,
)
def test_what_acts_on_one_token_at_a_time_is_continued(events, field: dict[str, Any]) -> None:
    first = lost_after(stream_of(WORDS[:3], has_end=False))
    second = lambda body: [sse(stream_of(WORDS[3:]))]  # noqa: E731
    with fakes(first, second) as found, gateway(*found) as (client, _):
        assert text_of(events(ask(client, stream=True, **field))) == "".join(WORDS)
        assert found[1].bodies[0]["continue_final_message"] is True


def test_the_server_that_continues_is_asked_in_its_own_way(events) -> None:
    """One that cannot continue is passed over, and its kind does not change the body."""
    rest = lambda body: [sse(stream_of(WORDS[2:]))]  # noqa: E731
    with fakes(lost_after(stream_of(WORDS[:2], has_end=False)), rest, rest) as found:
        kinds = ("vllm", "openai", "vllm")
        configs = [
            UpstreamConfig(url=fake.url, model="up", kind=kind)
            for fake, kind in zip(found, kinds, strict=True)
        ]
        with gateway(*configs) as (client, _):
            assert text_of(events(ask(client, stream=True))) == "".join(WORDS)
    assert not found[1].bodies
    assert found[2].bodies[0]["continue_final_message"] is True
    assert found[2].bodies[0]["add_generation_prompt"] is False


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("words", [WORDS, []])
@pytest.mark.parametrize("how", ["lost", "malformed"])
def test_a_server_lost_after_the_finish_reason_has_answered(
    events, num_servers: int, words: list[str], how: str
) -> None:
    parts = [stream_of(words, has_end=False), chunk({}, "stop")]
    parts += [b"data: {nonsense\n\n"] if how == "malformed" else []
    other = lambda body: [sse(stream_of(["more"]))]  # noqa: E731
    with (
        fakes(lost_after(*parts), other) as found,
        gateway(*found[:num_servers]) as (client, book),
    ):
        answer = ask(client, stream=True, response_format={"type": "json_object"})
        got = events(answer)
        assert text_of(got) == "".join(words)
        assert [item["choices"][0]["finish_reason"] for item in got].count("stop") == 1
    assert not found[1].bodies
    used = book.only()
    assert (used.reason, used.basis, used.output_tokens) == ("complete", "events", len(words))


def test_each_choice_must_have_ended() -> None:
    """A reason that comes twice for one choice is not the other's."""
    ends = [chunk({"content": "a"}), chunk({}, "stop"), chunk({}, "stop")]
    with fakes(lost_after(*ends)) as found, gateway(*found) as (client, book):
        assert "engine_unavailable" in ask(client, stream=True, n=2).text
    assert book.only().reason == "replica_lost"


def test_an_answer_that_reached_its_limit_is_not_asked_for_more(events) -> None:
    other = lambda body: [sse(stream_of(["more"]))]  # noqa: E731
    first = lost_after(stream_of(WORDS[:2], has_end=False))
    with fakes(first, other) as found, gateway(*found) as (client, _):
        got = events(ask(client, stream=True, max_tokens=2))
        assert text_of(got) == "".join(WORDS[:2])
        assert got[-1]["choices"][0]["finish_reason"] == "length"
    assert not found[1].bodies


DEEP = b'data: {"choices":[{"delta":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}]}\n\n"


@pytest.mark.parametrize(
    "bad",
    [
        b'data: {"choices":[{"delta":[1]}]}\n\n',
        b'data: {"choices":[{"delta":"text"}]}\n\n',
        b'data: {"choices":[{"delta":7}]}\n\n',
        DEEP,
    ],
    ids=["list", "string", "number", "deep"],
)
@pytest.mark.parametrize("num_words", [0, 2])
def test_a_delta_that_is_none_loses_the_server_and_not_the_answer(
    events, bad: bytes, num_words: int
) -> None:
    first = sse(stream_of(WORDS[:num_words], has_end=False) + bad)
    other = lambda body: [sse(stream_of(WORDS[num_words:]))]  # noqa: E731
    with fakes(lambda body: [first], other) as found, gateway(*found) as (client, book):
        answer = ask(client, stream=True)
        assert text_of(events(answer)) == "".join(WORDS)
    assert book.only().reason == "complete"


def test_what_a_foreign_server_says_is_quoted_briefly_and_answers_never() -> None:
    secret = "the secret answer"
    bad = b'data: {"choices": "' + secret.encode() + b'"}\n\n'
    batch = SseReader().feed(bad)
    assert batch.problem is not None
    assert secret not in batch.problem
    assert "bytes that are no event" in batch.problem
    long = json.dumps({"error": {"message": "m" * 5000}}).encode()
    batch = SseReader().feed(b"data: " + long + b"\n\n")
    assert batch.problem is not None
    assert len(batch.problem) < 250
    assert "mmm" in batch.problem


def test_a_long_event_costs_one_look_at_each_byte_and_has_an_end() -> None:
    reader = SseReader(max_event_bytes=1 << 20)
    begun_s = time.perf_counter()
    piece = b"x" * 16
    reader.feed(b'data: {"id": "')
    for _ in range((1 << 20) // 16 - 1):
        assert not reader.feed(piece).blocks
    batch = reader.feed(b'"}\n\ndata: [DONE]\n')
    assert len(batch.blocks) == 1
    assert reader.feed(b"\n").is_done
    assert time.perf_counter() - begun_s < 2, "copying the rest at each piece takes far longer"
    with pytest.raises(MalformedStream, match="more than 1048576 bytes"):
        reader.feed(b"y" * ((1 << 20) + 1))
