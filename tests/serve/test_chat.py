"""POST /v1/chat/completions: answers, streams, sampling fields, templates."""

from __future__ import annotations

import asyncio

import pytest

from mxn.engine.echo import EchoEngine, byte_tokenizer
from mxn.serve.chat.prompt import render
from mxn.serve.served import GenerationDefaults


def test_answer_has_the_shape_of_openai(api):
    body = api.chat("hi", max_tokens=3).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "echo"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_headers_name_model_device_and_request(api):
    headers = api.chat(max_tokens=1).headers
    assert headers["x-mxn-model"] == "echo"
    assert headers["x-mxn-device"] == "cpu:0 echo"
    assert headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", ["plain", "naïve 日本語 🙂🙃", "é" * 9, 'a\n\n"b"\\\u2028'])
def test_stream_joins_to_the_whole_answer(make_api, events, size, text):
    api = make_api(EchoEngine(tokens_per_delta=size))
    fields = {"max_tokens": 40, "stream_options": {"include_usage": True}}
    whole = api.chat(text, max_tokens=40).json()
    chunks = events(api.chat(text, stream=True, **fields))
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    joined = "".join(choice["delta"].get("content", "") for choice in choices)
    assert joined == whole["choices"][0]["message"]["content"]
    assert text in joined
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


def test_stream_follows_the_rules_of_the_protocol(api, events):
    chunks = events(api.chat("hello", stream=True, max_tokens=4, n=3, seed=0))
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert own[-1]["delta"] == {}


def test_chunks_before_the_last_carry_null_usage_when_usage_is_asked_for(api, events):
    options = {"include_usage": True}
    chunks = events(api.chat(stream=True, max_tokens=2, stream_options=options))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def test_streamed_logprobs_equal_the_whole_ones(api, events):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    whole = api.chat("hé🙂", **fields).json()["choices"][0]["logprobs"]["content"]
    chunks = events(api.chat("hé🙂", stream=True, **fields))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole
    assert len(whole) == 9


def test_logprobs_have_token_bytes_and_alternatives(api):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    content = api.chat("é", **fields).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "<|user|>"
    assert content[1]["token"] == "bytes:\\xc3"
    assert [entry["bytes"] for entry in content[1:3]] == [[0xC3], [0xA9]]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_logprobs_without_alternatives_are_empty_lists(api):
    content = api.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []


def test_n_choices_are_n_requests_with_consecutive_seeds(api):
    body = api.chat("abcdef", n=3, seed=5, max_tokens=6, ignore_eos=True).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3
    seen = api.engine.seen
    assert [request.sampling.seed for request in seen] == [5, 6, 7]
    assert [request.request_id for request in seen] == [f"{body['id']}-{i}" for i in range(3)]
    assert body["usage"]["prompt_tokens"] == len(seen[0].prompt_ids), "the prompt counts once"
    assert body["usage"]["completion_tokens"] == 18


def test_same_seed_gives_the_same_answer(api):
    first, second = (api.chat("abcdef", seed=3, max_tokens=9).json() for _ in range(2))
    assert first["choices"] == second["choices"]


def test_stop_string_never_leaks_and_is_named(api, events):
    fields = {"stop": ["lo w"], "max_tokens": 30}
    whole = api.chat("hello world", **fields).json()["choices"][0]
    assert whole["message"]["content"] == "hel"
    assert whole["finish_reason"] == "stop"
    chunks = events(api.chat("hello world", stream=True, **fields))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hel"


def test_request_fields_reach_the_replica(api):
    api.chat(
        temperature=0.3,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        logit_bias={"65": 3, "foo": 1},
        stop="x",
        stop_token_ids=[9],
        min_tokens=1,
        ignore_eos=True,
        max_tokens=50,
        max_completion_tokens=2,
    )
    sampling = api.engine.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.5, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.25, -0.5)
    assert sampling.logit_bias == {65: 3.0}, "keys that are no token ids are skipped"
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), (9,))
    assert sampling.max_tokens == 2, "max_completion_tokens wins"
    assert sampling.ignore_eos
    assert sampling.min_tokens == 1


def test_generation_config_fills_what_the_request_leaves_out(make_api):
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    api = make_api(defaults=defaults)
    api.chat(max_tokens=1)
    api.chat(max_tokens=1, temperature=0, top_p=1, top_k=0, repetition_penalty=1)
    silent, explicit = (request.sampling for request in api.engine.seen)
    assert (silent.temperature, silent.top_p, silent.top_k) == (0.6, 0.9, 20)
    assert silent.repetition_penalty == 1.1
    assert (explicit.temperature, explicit.top_p, explicit.top_k) == (0, 1, 0)
    assert explicit.repetition_penalty == 1


def test_generation_defaults_are_read_from_the_checkpoint(tmp_path):
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    text = '{"temperature": 0.7, "top_k": null, "eos_token_id": [1, 2]}'
    (tmp_path / "generation_config.json").write_text(text)
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(temperature=0.7)


def test_null_fields_mean_the_default(api):
    names = ("temperature", "stop", "n", "seed", "logit_bias", "tools", "response_format", "user")
    assert api.chat(max_tokens=1, **dict.fromkeys(names)).status_code == 200


def test_unknown_and_unused_fields_are_ignored(api):
    extra = {"user": "u", "metadata": {"a": 1}, "service_tier": "auto", "field_of_next_month": [1]}
    assert api.chat(max_tokens=1, store=True, **extra).status_code == 200


def test_text_parts_are_joined_and_developer_means_system(api):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]},
    ]
    api.chat(messages=messages, max_tokens=1)
    prompt = api.engine.tokenizer.decode(api.engine.seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt == "<|system|>be kind<|end|><|user|>one\ntwo<|end|><|assistant|>"


def test_continue_final_message_leaves_the_answer_open(api):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "half an"}]
    api.chat(messages=messages, max_tokens=1, continue_final_message=True)
    prompt = api.engine.tokenizer.decode(api.engine.seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("<|assistant|>half an")


def test_tools_with_tool_choice_none_are_answered_in_text(api):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert api.chat(tools=tools, tool_choice="none", max_tokens=1).status_code == 200
    assert api.chat(response_format={"type": "text"}, max_tokens=1).status_code == 200


def test_model_without_template_points_to_completions(make_api):
    api = make_api(EchoEngine(byte_tokenizer(chat_template=None)))
    response = api.chat()
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


def test_model_may_be_left_out_where_only_one_is_served(make_api):
    api = make_api(is_alone=True)
    assert api.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_huge_conversation_is_rendered_beside_the_loop(make_api, monkeypatch):
    seen = []
    monkeypatch.setattr(
        asyncio, "to_thread", lambda function, *rest: seen.append(function) or _now(function, *rest)
    )
    api = make_api(EchoEngine(max_context=1 << 20))
    api.chat("x" * 1000, max_tokens=1)
    assert render not in seen
    assert api.chat("x" * (256 << 10), max_tokens=1).status_code == 200
    assert render in seen


async def _now(function, *rest):
    return function(*rest)


def test_fields_without_a_meaning_here_are_accepted(api):
    fields = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "x"}, "verbosity": "low",
        "modalities": ["text"], "audio": None, "web_search_options": {},
        "parallel_tool_calls": True, "reasoning_effort": "high",
    }  # fmt: skip
    assert api.chat(max_tokens=1, **fields).status_code == 200


def test_the_document_knows_tools_and_forms(api):
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    request = schemas["ChatRequest"]["properties"]
    assert "ChatTool" in str(request["tools"])
    assert "ResponseFormat" in str(request["response_format"])
    assert "MadeToolCall" in str(schemas["AssistantMessage"]["properties"]["tool_calls"])
    assert "reasoning_content" in schemas["ChatDelta"]["properties"]
