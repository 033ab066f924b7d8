"""What takes long is done beside the event loop, and what is hopeless is not done at all."""

from __future__ import annotations

import threading
import time

import pytest

from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat import lark, prompt
from mxn.serve.openai.types import ChatMessage, ChatRequest, ContentPart, FunctionCall, ToolCall

STRICT = {
    "name": "f",
    "strict": True,
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}
MESSAGES = [{"role": "user", "content": "hi"}]
LONG = "x" * 300_000


@pytest.fixture
def threads(monkeypatch) -> dict[str, set[bool]]:
    """Return who ran what: name of a function → whether it ran on the main thread, the loop's."""
    seen: dict[str, set[bool]] = {}

    def watch(owner, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            is_main = threading.current_thread() is threading.main_thread()
            seen.setdefault(name, set()).add(is_main)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(lark, "fault")
    watch(prompt, "render")
    watch(Tokenizer, "encode")
    return seen


def test_counting_tokens_checks_grammars_beside_the_loop(make_api, threads):
    api = make_api(is_alone=True)
    counted = api.post(
        "/v1/responses/input_tokens",
        {"model": "echo", "input": "hi", "tools": [{"type": "function", **STRICT}]},
    )
    assert counted.status_code == 200, counted.text
    assert counted.json()["input_tokens"] > 0
    assert threads["fault"] == {False}
    plain = api.post("/v1/messages/count_tokens", {"model": "echo", "messages": MESSAGES})
    schema = STRICT["parameters"]
    tools = [{"name": "f", "strict": True, "input_schema": schema}]
    more = api.post(
        "/v1/messages/count_tokens", {"model": "echo", "messages": MESSAGES, "tools": tools}
    )
    assert more.json()["input_tokens"] > plain.json()["input_tokens"]
    assert threads["fault"] == {False}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "tools": [
                    {"type": "function", "function": {"name": f"g{k}", "description": LONG}}
                    for k in range(3)
                ],
            },
            "messages",
        ),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/embeddings", {"model": "embed", "input": ["a", LONG]}, "input[1]"),
        ("/rerank", {"model": "rank", "query": "q", "documents": ["a", LONG]}, "documents[1]"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(api, threads, path, fields, param):
    answer = api.post(path, {"model": "echo"} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert "This model's context is 4096 tokens; the request needs at least" in error["message"]
    assert error["n_prompt_tokens"] > error["n_ctx"] == 4096
    assert "encode" not in threads
    assert threads.get("render", {False}) == {False}


def test_tokenize_counts_also_what_does_not_fit_and_renders_it_aside(api, threads):
    body = {"model": "echo", "messages": [{"role": "user", "content": LONG}]}
    answer = api.post("/tokenize", body)
    assert answer.json()["count"] >= len(LONG)
    assert threads["render"] == threads["encode"] == {False}


def request(**fields) -> ChatRequest:
    return ChatRequest(**{"messages": [ChatMessage(role="user", content="hi")]} | fields)


def said(**fields) -> ChatRequest:
    return request(messages=[ChatMessage(role="assistant", **fields)])


CALL = FunctionCall(name="f", arguments=LONG)
BIG_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {LONG: 1}}}}


@pytest.mark.parametrize(
    ("body", "tools"),
    [
        (said(content=LONG), None),
        (said(content=[ContentPart(type="text", text=LONG)]), None),
        (said(tool_calls=[ToolCall(id="c", function=CALL)]), None),
        (said(function_call=CALL), None),
        (said(reasoning_content=LONG), None),
        (request(documents=[{"text": LONG}]), None),
        (request(chat_template_kwargs={"a": {"b": [LONG]}}), None),
        (request(chat_template_kwargs={"a": [[]] * 10_000}), None),
        (request(chat_template_kwargs={"a": {str(k): 1 for k in range(10_000)}}), None),
        (request(), [BIG_TOOL]),
        (request(messages=[ChatMessage(role="user", content="hi")] * 1500), None),
    ],
)
def test_all_that_a_template_sees_counts_as_long(body, tools):
    assert not prompt._is_small(body, tools)
    assert prompt._is_small(request(), [{"type": "function", "function": STRICT}])


def test_a_body_that_is_nested_deeply_is_measured_in_no_time():
    nest: list = []
    for _ in range(100_000):
        nest = [nest]
    begun_s = time.perf_counter()
    assert not prompt._is_small(request(chat_template_kwargs={"a": nest}), None)
    assert not prompt._is_small(request(chat_template_kwargs={"a": [1] * 5_000_000}), None)
    assert time.perf_counter() - begun_s < 0.5
