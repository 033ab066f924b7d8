"""The form of an answer: JSON, schemas, expressions, choices; and the official client's helpers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from mxn.engine.echo import EchoEngine
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from support.scripted import ScriptedEngine, marked_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
GOOD, BAD = '{"answer": 4}', '{"answer": "four"}'
THOUGHT = "<think>\nHm.\n</think>\n\n"


def schema_format(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **fields}}


FORMS = [
    ({"response_format": schema_format()}, GOOD, BAD),
    ({"response_format": schema_format(strict=True)}, GOOD, BAD),
    ({"response_format": {"type": "json_object"}}, BAD, "[1]"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, GOOD, BAD),
    ({"guided_json": SCHEMA}, GOOD, BAD),
    ({"guided_json": json.dumps(SCHEMA)}, GOOD, BAD),
    ({"guided_regex": r"\d+/\d{2}"}, "1/23", "1/2"),
    ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
    ({"guided_choice": ["a\nb", "c"]}, "a\nb", "a"),
    ({"guided_grammar": 'start: "a" rest\nrest: "b" | "c"'}, "ac", "ad"),
    ({"structured_outputs": {"json": SCHEMA}}, GOOD, BAD),
    ({"structured_outputs": {"regex": "[ab]+"}}, "abba", "c"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes", "y"),
    ({"structured_outputs": {"grammar": 'start: "x"+'}}, "xxx", "y"),
    ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), FORMS)
@pytest.mark.parametrize("is_special", [False, True])
def test_the_form_is_a_grammar_also_behind_a_thought(make_api, fields, good, bad, is_special):
    tokenizer = marked_tokenizer(is_special=is_special)
    texts = (good, THOUGHT + good, bad, THOUGHT + bad)
    engine = ScriptedEngine(*texts, tokenizer=tokenizer)
    api = make_api(engine)
    answers = [api.chat("2+2?", **fields).json()["choices"][0]["message"] for _ in texts]
    assert engine.refused == [bad, THOUGHT + bad]
    assert [answer["content"] for answer in answers] == [good, good, bad, bad]
    assert answers[1]["reasoning"] == "Hm."


def test_prompt_with_an_open_thought_needs_its_end(make_api):
    engine = ScriptedEngine("Hm.\n</think>\n\n" + GOOD, GOOD)
    api = make_api(engine)
    for _ in range(2):
        kwargs = {"thinks": True}
        api.chat("2+2?", response_format=schema_format(), chat_template_kwargs=kwargs)
    assert engine.refused == [GOOD]


def test_without_thoughts_the_grammar_is_the_form_itself(make_api):
    engine = EchoEngine()
    make_api(engine).chat(response_format=schema_format(), max_tokens=1)
    grammar = engine.seen[0].sampling.grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source).items() >= SCHEMA.items()


def test_form_and_tools_let_the_model_choose(make_api):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    call = f'<tool_call>\n{{"name": "f", "arguments": {GOOD}}}\n</tool_call>'
    engine = ScriptedEngine(GOOD, call, "text", call.replace("4", "true"))
    api = make_api(engine)
    reasons = [
        api.chat(tools=tools, response_format=schema_format()).json()["choices"][0]["finish_reason"]
        for _ in range(4)
    ]
    assert engine.refused == ["text", call.replace("4", "true")]
    assert reasons == ["stop", "tool_calls", "stop", "tool_calls"]


def test_text_is_free(make_api):
    engine = ScriptedEngine("hi")
    make_api(engine).chat(response_format={"type": "text"})
    assert engine.grammars == [None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": schema_format({"type": "strin"})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": schema_format({"properties": {"a": {"not": {}}}})},
            "response_format.json_schema.schema",
        ),
        ({"response_format": schema_format([])}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
        ),
    ],
)
def test_what_cannot_be_enforced_is_400_before_the_run(make_api, fields, param):
    api = make_api(EchoEngine())
    response = api.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert api.engine.seen == []


class Answer(BaseModel):
    answer: int


class Weather(BaseModel):
    """What is the weather?"""

    city: str
    unit: Literal["C", "F"]


CALL = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Rome", "unit": "C"}}\n</tool_call>'
MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    models = ServedModels(
        [
            ServedModel(name=name, client=engine, tokenizer=engine.tokenizer)
            for name, engine in (
                ("json", ScriptedEngine(THOUGHT + GOOD)),
                ("call", ScriptedEngine(f"See:{CALL}", tokens_per_delta=3)),
                ("two", ScriptedEngine(f"{CALL}\n{CALL}")),
            )
        ]
    )
    with running(create_app(models)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_official_client_parses_into_pydantic(client):
    answer = client.chat.completions.parse(model="json", messages=MESSAGES, response_format=Answer)
    message = answer.choices[0].message
    assert message.parsed == Answer(answer=4)
    assert message.reasoning_content == "Hm."


def test_official_client_parses_tool_calls_into_pydantic(client):
    answer = client.chat.completions.parse(
        model="two", messages=MESSAGES, tools=[pydantic_function_tool(Weather)],
        tool_choice="required",
    )  # fmt: skip
    calls = answer.choices[0].message.tool_calls
    assert [item.function.parsed_arguments for item in calls] == 2 * [
        Weather(city="Rome", unit="C")
    ]
    assert len({item.id for item in calls}) == 2


def test_official_stream_helper_accumulates_calls(client):
    tools = [pydantic_function_tool(Weather)]
    with client.chat.completions.stream(model="call", messages=MESSAGES, tools=tools) as stream:
        kinds = [item.type for item in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "See:"
    [item] = final.message.tool_calls
    assert item.function.parsed_arguments == Weather(city="Rome", unit="C")


def test_official_stream_helper_parses_content(client):
    with client.chat.completions.stream(
        model="json", messages=MESSAGES, response_format=Answer
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Answer(answer=4)
