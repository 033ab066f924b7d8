"""Tools through the chat API: what the prompt holds, what is forced, what comes out."""

from __future__ import annotations

from typing import Any

import pytest

from mxn.engine.echo import CHAT_TEMPLATE, EchoEngine, byte_tokenizer
from mxn.errors import ConfigError
from mxn.serve.settings import ServeSettings
from support.scripted import ScriptedEngine, marked_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer"}},
}


def tool(name: str, parameters: dict[str, Any] | None = PARAMETERS, **fields: Any) -> dict:
    function = {"name": name, "description": f"the {name}", "parameters": parameters, **fields}
    return {"type": "function", "function": function}


TOOLS = [tool("weather"), tool("wind", None)]
ROME = '{"city": "Rome", "days": 3}'


def call(name: str = "weather", arguments: str = ROME) -> str:
    """Return a call as the grammar of the scripted models' family writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TWO = f"{call()}\n{call('wind', '{}')}"


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def prompt_of(api, at: int = 0) -> str:
    return api.engine.tokenizer.decode(api.engine.seen[at].prompt_ids, skip_special_tokens=False)


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """Join the deltas of a choice like a client does, checking the rules on the way."""
    content, calls, reasons = "", [], []
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert not reasons, "nothing follows the end of a choice"
            content += choice["delta"].get("content") or ""
            for item in choice["delta"].get("tool_calls", ()):
                if item["index"] == len(calls):
                    assert item["type"] == "function"
                    calls.append({"id": item["id"], "type": "function", "function": {
                        "name": item["function"]["name"], "arguments": ""}})  # fmt: skip
                else:
                    assert set(item) == {"index", "function"}
                    assert set(item["function"]) == {"arguments"}
                calls[item["index"]]["function"]["arguments"] += item["function"]["arguments"]
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
    return {"content": content or None, "calls": calls, "reason": reasons[0]}


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_the_same_streamed_and_whole(make_api, events, is_special, size):
    tokenizer = marked_tokenizer(is_special=is_special)
    engine = ScriptedEngine(f"Let me see.{TWO}", tokenizer=tokenizer, tokens_per_delta=size)
    api = make_api(engine)
    [choice] = api.chat("Weather?", tools=TOOLS).json()["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    functions = [item["function"] for item in message["tool_calls"]]
    assert functions == [
        {"name": "weather", "arguments": ROME},
        {"name": "wind", "arguments": "{}"},
    ]
    ids = [item["id"] for item in message["tool_calls"]]
    assert all(one.startswith("call_") for one in ids)
    assert len(set(ids)) == 2
    streamed = joined(events(api.chat("Weather?", tools=TOOLS, stream=True)))
    assert [item["function"] for item in streamed["calls"]] == functions
    assert (streamed["content"], streamed["reason"]) == ("Let me see.", "tool_calls")
    assert not set(ids) & {item["id"] for item in streamed["calls"]}


def test_content_is_null_beside_calls_alone(make_api):
    message = make_api(ScriptedEngine(call())).chat(tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] is None


def test_arguments_are_streamed_while_they_are_written(make_api, events):
    chunks = events(make_api(ScriptedEngine(call())).chat(tools=TOOLS, stream=True))
    pieces = [
        item["function"]["arguments"]
        for chunk in chunks
        for item in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert len(pieces) > 20


def test_tools_are_in_the_prompt_and_none_keeps_them_out(make_api):
    api = make_api(ScriptedEngine(call()))
    api.chat(tools=TOOLS)
    assert '"name": "weather"' in prompt_of(api)
    [choice] = api.chat(tools=TOOLS, tool_choice="none").json()["choices"]
    assert "weather" not in prompt_of(api, 1)
    assert choice["message"]["content"] == call(), "not parsed"
    assert choice["finish_reason"] == "stop"


def test_text_that_never_becomes_a_call_is_not_lost(make_api, events):
    for text in ("a <tool_call> b", '<tool_call>{"x": 1}</tool_call>', "end <tool"):
        api = make_api(ScriptedEngine(text))
        [choice] = api.chat(tools=TOOLS).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert joined(events(api.chat(tools=TOOLS, stream=True)))["content"] == text


def test_cut_off_arguments_end_with_length(make_api):
    [choice] = make_api(ScriptedEngine(call())).chat(tools=TOOLS, max_tokens=45).json()["choices"]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments
    assert ROME.startswith(arguments)


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize(
    ("choice", "good", "bad"),
    [
        ("required", TWO, "Hello"),
        (named("weather"), call(), call("wind", "{}")),
        (named("wind"), call("wind", "{}"), TWO),
        (
            {"type": "allowed_tools",
             "allowed_tools": {"mode": "required", "tools": [named("wind")]}},
            call("wind", "{}"), call(),
        ),
    ],
)  # fmt: skip
def test_a_call_is_forced_by_a_grammar(make_api, is_special, choice, good, bad):
    tokenizer = marked_tokenizer(is_special=is_special)
    engine = ScriptedEngine(good, tokenizer=tokenizer)
    answer = make_api(engine).chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]
    assert engine.refused == []
    assert answer["finish_reason"] == "tool_calls"
    refusing = ScriptedEngine(bad, call(arguments='{"days": 3}'), tokenizer=tokenizer)
    api = make_api(refusing)
    api.chat(tools=TOOLS, tool_choice=choice)
    api.chat(tools=TOOLS, tool_choice=choice)
    assert len(refusing.refused) == 2
    engine = ScriptedEngine(f"<think>\nWhich?\n</think>\n\n{good}", tokenizer=tokenizer)
    answer = make_api(engine).chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]
    assert engine.refused == [], "a thought comes first"
    assert answer["message"]["reasoning"] == "Which?"


def test_without_choice_and_strict_nothing_is_forced(make_api):
    engine = ScriptedEngine("hi")
    api = make_api(engine)
    api.chat(tools=TOOLS)
    api.chat(tools=TOOLS, tool_choice="auto")
    assert engine.grammars == [None, None]


def test_strict_tools_hold_their_arguments_to_the_schema(make_api):
    tools = [tool("weather", strict=True)]
    engine = ScriptedEngine("Just text.", f"Text. {call()}", call(arguments='{"town": 1}'))
    api = make_api(engine)
    for _ in range(3):
        api.chat(tools=tools)
    assert engine.refused == [call(arguments='{"town": 1}')]


def test_one_call_where_parallel_calls_are_off(make_api, events):
    engine = ScriptedEngine(f"{TWO}\nbye")
    api = make_api(engine)
    fields = {"tools": TOOLS, "parallel_tool_calls": False}
    [choice] = api.chat(**fields).json()["choices"]
    assert [item["function"]["name"] for item in choice["message"]["tool_calls"]] == ["weather"]
    assert len(joined(events(api.chat(stream=True, **fields)))["calls"]) == 1
    forced = ScriptedEngine(call(), TWO)
    api = make_api(forced)
    for _ in range(2):
        api.chat(tool_choice="required", **fields)
    assert forced.refused == [TWO]


def test_every_choice_has_calls_of_its_own(make_api, events):
    api = make_api(ScriptedEngine(call(), "text", TWO))
    body = api.chat(tools=TOOLS, n=3).json()
    counts = [len(choice["message"].get("tool_calls", ())) for choice in body["choices"]]
    assert counts == [1, 0, 2]
    reasons = [choice["finish_reason"] for choice in body["choices"]]
    assert reasons == ["tool_calls", "stop", "tool_calls"]
    chunks = events(api.chat(tools=TOOLS, n=3, stream=True))
    assert [len(joined(chunks, index)["calls"]) for index in range(3)] == counts


def test_every_token_has_its_logprob_once_beside_calls(make_api, events):
    api = make_api(ScriptedEngine(f"Hm. {TWO}", tokens_per_delta=3))
    body = api.chat(tools=TOOLS, logprobs=True).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    chunks = events(api.chat(tools=TOOLS, logprobs=True, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_continuous_usage_counts_in_every_chunk(make_api, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    api = make_api(ScriptedEngine(call()))
    chunks = events(api.chat(tools=TOOLS, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert len(set(counts)) > 20


FUNCTIONS = [TOOLS[0]["function"], {"name": "wind"}]


def test_older_names_are_mapped_both_ways(make_api, events):
    api = make_api(ScriptedEngine(TWO))
    [choice] = api.chat(functions=FUNCTIONS).json()["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": ROME}
    assert "tool_calls" not in choice["message"]
    chunks = events(api.chat(functions=FUNCTIONS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    pieces = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert pieces[0]["name"] == "weather"
    assert "".join(piece["arguments"] for piece in pieces) == ROME
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_older_choice_forces_a_function(make_api):
    engine = ScriptedEngine(call("wind", "{}"), call())
    api = make_api(engine)
    for _ in range(2):
        api.chat(functions=FUNCTIONS, function_call={"name": "wind"})
    assert engine.refused == [call()]
    api.chat(functions=FUNCTIONS, function_call="none")
    assert "weather" not in prompt_of(api, 2)


def test_older_messages_are_rendered_like_the_newer_ones(make_api):
    api = make_api(ScriptedEngine("ok"))
    function = {"name": "weather", "arguments": ROME}
    made = {"id": "call_0", "type": "function", "function": function}
    for calls, role in (
        ({"function_call": function}, "function"),
        ({"tool_calls": [made]}, "tool"),
    ):
        api.chat(messages=[
            {"role": "assistant", "content": None, **calls},
            {"role": role, "name": "weather", "tool_call_id": "call_0", "content": "sunny"},
        ])  # fmt: skip
    assert prompt_of(api, 0) == prompt_of(api, 1)
    assert '"city": "Rome"' in prompt_of(api)


def test_models_without_tools_in_their_template_get_an_instruction(make_api):
    engine = ScriptedEngine(call(), tokenizer=byte_tokenizer())
    api = make_api(engine)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": TOOL_CALL}]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "windy"},
    ]
    body = api.chat(messages=messages, tools=TOOLS, tool_choice="required").json()
    assert engine.refused == []
    assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == ROME
    prompt = prompt_of(api)
    assert prompt.startswith("<|system|>Be kind.\n\nYou may call functions.")
    assert '"name": "weather"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}' in prompt
    results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwindy\n</tool_response>"
    assert f"<|user|>{results}<|end|>" in prompt


TOOL_CALL = {"name": "weather", "arguments": ROME}


def test_template_without_system_role_has_the_instruction_in_the_user_message(make_api):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=refuses + CHAT_TEMPLATE)
    api = make_api(ScriptedEngine("ok", tokenizer=tokenizer))
    assert api.chat("Weather?", tools=TOOLS).status_code == 200
    assert prompt_of(api).startswith("<|user|>You may call functions.")
    assert prompt_of(api).endswith("\n\nWeather?<|end|><|assistant|>")


def test_short_ids_for_templates_that_want_them(make_api):
    template = (
        "{% if tools %}[TOOL_CALLS]{% endif %}{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}({{ c.id }}){% endfor %}<{{ m.tool_call_id }}>"
        "{% endfor %}"
    )
    api = make_api(ScriptedEngine("ok", tokenizer=byte_tokenizer(chat_template=template)))
    long = "call_0123456789abcdef"
    messages = [
        {"role": "assistant", "tool_calls": [{"id": long, "function": TOOL_CALL}]},
        {"role": "tool", "tool_call_id": long, "content": "sunny"},
    ]
    assert api.chat(messages=messages).status_code == 200
    assert "(789abcdef)" in prompt_of(api)
    assert "<789abcdef>" in prompt_of(api)


def test_settings_name_the_parser(make_api):
    settings = ServeSettings(tool_parser="mistral")
    api = make_api(ScriptedEngine(f"[TOOL_CALLS]weather[ARGS]{ROME}"), settings=settings)
    [choice] = api.chat(tools=TOOLS).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
        ({"tools": [tool("f", {"type": "string"})]}, "tools[0].function.parameters"),
        (
            {"tools": [tool("f", {"properties": {"a": {"type": "x"}}}, strict=True)]},
            "tools[0].function.parameters",
        ),
        ({"tools": [tool(f"f{at}") for at in range(129)]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("storm")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": named("weather")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 3}, "tool_choice"),
        ({"functions": FUNCTIONS, "function_call": {"name": "storm"}}, "function_call"),
        ({"tools": TOOLS, "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_what_cannot_be_is_400_with_param(make_api, fields, param):
    api = make_api(EchoEngine())
    response = api.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert api.engine.seen == []


def test_schema_that_no_grammar_can_hold_means_any_object_without_strict(make_api):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    engine = ScriptedEngine(call(arguments='{"b": [1]}'))
    api = make_api(engine)
    assert api.chat(tools=[tool("weather", schema)], tool_choice="required").status_code == 200
    assert engine.refused == []


def test_unknown_parsers_are_refused_at_the_start():
    with pytest.raises(ConfigError, match="unknown tool parser 'x'; one of hermes"):
        ServeSettings(tool_parser="x")
    with pytest.raises(ConfigError, match="unknown reasoning parser 'x'"):
        ServeSettings(reasoning_parser="x")
