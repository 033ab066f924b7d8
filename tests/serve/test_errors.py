"""One error shape everywhere: all routes are walked with everything that can be wrong."""

from __future__ import annotations

import json
import logging

import pytest

from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import Loading
from mxn.errors import EngineDiedError, InternalError
from mxn.serve.app import create_app
from mxn.serve.openai.errors import from_exception
from mxn.serve.served import ServedModels
from mxn.serve.settings import ServeSettings

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}


def assert_error(response, status, code=None, type="invalid_request_error"):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == type
    if code is not None:
        assert error["code"] == code
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return error


def routes(app):
    return sorted((route.path, method) for route in app.routes for method in route.methods)


# Another shape, a form, or no model in the body: tested in files of their own.
OTHERS = (
    "/maas/", "/v1/messages", "/v1/responses", "/v1/files", "/v1/batches",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip


def test_every_route_answers_mistakes_in_the_one_shape(api):
    walked = 0
    for path, method in routes(api.app):
        if path.startswith(OTHERS):
            continue
        assert_error(api.request("DELETE", path), 405, "method_not_allowed")
        if method != "POST":
            continue
        if path.startswith("/replica/"):  # they take MessagePack
            for content in (b"", b"{", b"\xff\xfe", b"\xc1", b"\x93\x01"):
                answer = api.request("POST", path, content=content)
                assert_error(answer, 400, "invalid_message")
            continue
        walked += 1
        for content in (b"", b"{", b"\xff\xfe", b"nonsense", b'{"model": NaN}'):
            assert_error(api.request("POST", path, content=content), 400, "invalid_json")
        for content in (b"[]", b"3", b'"text"', b"null", b"[" * 100_000, b'{"model": 3, x'):
            assert_error(api.request("POST", path, content=content), 400)
        assert assert_error(api.post(path, {"model": 3}), 400)["param"] == "model"
        missing = assert_error(api.post(path, {"model": "echo"}), 400)
        assert missing["param"]
    assert walked == 10


def test_unknown_model_is_404_on_every_route_that_takes_one(api):
    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"prompt": "a"},
        "/v1/embeddings": {"input": "a"},
        "/v1/rerank": {"query": "a", "documents": ["a"]},
        "/v1/score": {"text_1": "a", "text_2": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        error = assert_error(api.post(path, body | {"model": "nope"}), 404, "model_not_found")
        assert error["param"] == "model"
        assert "'nope'" in error["message"]
        assert_error(api.post(path, body | {"model": None}), 400)
    assert_error(api.get("/v1/models/nope"), 404, "model_not_found")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/chat/completions/x"])
def test_unknown_urls_are_404_in_shape(api, path):
    assert_error(api.get(path), 404, "unknown_url")


def test_405_says_what_is_allowed(api):
    assert api.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": 2**80}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_types_and_values_are_400_with_param(api, fields, param, stream):
    error = assert_error(api.post("/v1/chat/completions", CHAT | {"stream": stream} | fields), 400)
    assert error["param"] == param


def test_message_says_limit_and_value(api):
    error = assert_error(api.chat(temperature=2.5), 400)
    assert "2.5" in error["message"]
    assert "<= 2.0" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_context_overflow_says_both_numbers(api, stream):
    error = assert_error(api.chat("x" * 5000, stream=stream), 400, "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5003, 4096)
    assert "5003" in error["message"]
    assert "4096" in error["message"]
    assert error["param"] == "messages"
    error = assert_error(api.chat("hi", max_tokens=4093), 400, "context_length_exceeded")
    assert error["param"] == "max_tokens"
    assert api.engine.seen == [], "refused before it was queued"


def test_body_over_the_limit_is_413(make_api):
    api = make_api(settings=ServeSettings(max_body_bytes=1000))
    assert_error(api.chat("x" * 2000), 413, "request_too_large")

    async def pieces():
        for _ in range(3):
            yield b"x" * 500

    response = api.request("POST", "/v1/completions", content=pieces())
    assert_error(response, 413, "request_too_large")
    assert api.chat("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_request_the_replica_refuses_is_400_also_when_streamed(make_api, stream):
    api = make_api(EchoEngine(refuses="no such token"))
    assert assert_error(api.chat(stream=stream), 400)["message"] == "no such token"


@pytest.mark.parametrize("stream", [False, True])
def test_dead_replica_is_503_with_retry_after(make_api, stream):
    api = make_api(EchoEngine(dies_after=0))
    for _ in range(2):  # the one that sees it die, and the next
        response = api.chat(stream=stream)
        assert_error(response, 503, "engine_unavailable", type="server_error")
        assert int(response.headers["retry-after"]) >= 1


def test_replica_that_dies_in_mid_stream_is_an_error_event(make_api):
    response = make_api(EchoEngine(dies_after=3)).chat(stream=True, max_tokens=9)
    assert response.status_code == 200
    *_, error, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    detail = json.loads(error.removeprefix("data: "))["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert detail["code"] == "engine_unavailable"


def test_template_error_is_400(make_api):
    from mxn.engine.echo import byte_tokenizer

    template = "{{ raise_exception('roles must alternate') }}"
    api = make_api(EchoEngine(byte_tokenizer(chat_template=template)))
    assert "roles must alternate" in assert_error(api.chat(), 400)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"self": 1}},
        {"repetition_penalty": 1e-40},
    ],
    ids=["self", "penalty"],
)
def test_strange_values_are_the_callers_mistake(api, fields):
    response = api.chat(**fields)
    assert (response.status_code, set(response.json())) == (400, {"error"})


def test_tool_arguments_nested_without_end_stay_text(make_api):
    api = make_api(EchoEngine(max_context=1 << 17))
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    call = {"function": {"name": "f", "arguments": deep}}
    messages = [{"role": "assistant", "content": "hi", "tool_calls": [call]}]
    assert api.chat(messages=messages, max_tokens=1).status_code == 200


def test_tool_arguments_too_deep_for_a_template_are_400(api):
    deep = json.loads('{"a":' * 600 + "1" + "}" * 600)
    call = {"function": {"name": "f", "arguments": deep}}
    response = api.chat(messages=[{"role": "assistant", "content": "hi", "tool_calls": [call]}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_retry_advice_follows_the_replica():
    soon = from_exception(EngineDiedError("restarting", retry_after_s=4.2))
    assert soon.headers == {"retry-after": "5"}
    never = from_exception(EngineDiedError("gave up"))
    assert never.headers["x-should-retry"] == "false"


def test_bug_is_500_without_details(make_api, caplog, monkeypatch):
    # import-linter, which another test runs in this process, switches existing loggers off.
    monkeypatch.setattr(logging.getLogger("mxn.serve"), "disabled", False)

    class Broken(EchoEngine):
        def generate(self, request):
            raise RuntimeError("secret path /etc/x")

    api = make_api(Broken())
    for stream in (False, True):
        response = api.chat(stream=stream)
        assert_error(response, 500, "internal_error", type="server_error")
        assert "secret" not in response.text
    assert "secret path" in caplog.text, "the log has what the client does not"
    assert response.headers["x-request-id"] in caplog.text
    assert from_exception(InternalError("x")).status == 500


def test_model_that_loads_is_503_and_health_says_which(api_of):
    models = ServedModels()
    models.expect("slow")
    api = api_of(create_app(models))
    response = api.post("/v1/chat/completions", CHAT | {"model": "slow"})
    assert_error(response, 503, "model_loading", type="model_loading")
    assert response.headers["retry-after"]
    models.report_progress("slow", Loading(stage="weights", done=1, total=4))
    response = api.post("/v1/chat/completions", CHAT | {"model": None})
    assert "weights, 25 %" in assert_error(response, 503, type="model_loading")["message"]
    health = api.get("/health")
    assert health.status_code == 503
    assert health.json()["models"]["slow"]["status"] == "loading"
    models.report_failure("slow", "no such file")
    assert api.get("/health").json()["models"]["slow"]["reason"] == "no such file"
    response = api.post("/v1/chat/completions", CHAT | {"model": "slow"})
    assert_error(response, 503, "model_failed", type="server_error")
