"""The Responses API through the official client, and its builder."""

from __future__ import annotations

import json
import time

import openai
import pytest

from mxn.serve.chat.events import Finished, Reasoning, Text, ToolCallArguments, ToolCallStart
from mxn.serve.responses.answer import Builder
from mxn.serve.responses.types import Response


@pytest.fixture
def client(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_and_its_stream_say_the_same(client):
    asked = {"model": "echo", "input": "hello there", "max_output_tokens": 4, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 4
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events if event.type != "x"] == sorted(
        event.sequence_number for event in events
    )
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == whole.output_text == events[-1].response.output_text


def test_a_stored_answer_is_read_followed_listed_and_deleted(client):
    first = client.responses.create(model="echo", input="one", max_output_tokens=4)
    again = client.responses.retrieve(first.id)
    assert again.output_text == first.output_text
    second = client.responses.create(
        model="echo", input="two", max_output_tokens=4, previous_response_id=first.id
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    count = client.responses.input_tokens.count(
        model="echo", input="two", previous_response_id=first.id
    )
    assert count.input_tokens == second.usage.input_tokens
    items = client.responses.input_items.list(second.id)
    assert items.data[0].content[0].text == "two"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="echo", input="x", previous_response_id=first.id)


def test_store_false_keeps_nothing(client):
    made = client.responses.create(model="echo", input="x", store=False, max_output_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_background_answer_is_polled(client):
    made = client.responses.create(
        model="echo", input="hello there", background=True, max_output_tokens=4
    )
    assert made.status == "queued"
    deadline_s = time.monotonic() + 10
    while made.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
        made = client.responses.retrieve(made.id)
    assert made.status == "incomplete"
    assert made.usage.output_tokens == 4
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(client.responses.create(model="echo", input="x").id)


def test_mistakes_name_their_field(client):
    with pytest.raises(openai.BadRequestError, match="input"):
        client.responses.create(model="echo")
    with pytest.raises(openai.BadRequestError, match="web_search"):
        client.responses.create(model="echo", input="x", tools=[{"type": "web_search"}])
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="x")


def _builder():
    return Builder(Response(id="resp_1", created_at=0.0, status="queued", model="m"))


def test_items_follow_each_other_and_events_name_them():
    builder = _builder()
    said = builder.begin()
    for event in (
        Reasoning(0, "hm"), Text(0, "so"), Text(0, " it is"),
        ToolCallStart(0, 0, "call_1", "look"), ToolCallArguments(0, 0, '{"a":'),
        ToolCallArguments(0, 0, "1}"), Finished(0, "tool_calls"),
    ):  # fmt: skip
        said += builder.add(event)
    response = builder.response
    assert [type(item).__name__ for item in response.output] == [
        "ReasoningItem", "MessageItem", "FunctionCallItem",
    ]  # fmt: skip
    assert response.output[1].content[0].text == "so it is"
    assert response.output[2].arguments == '{"a":1}'
    assert response.status == "completed"
    events = [json.loads(line[6:]) for line in builder.encode(said).decode().split("\n") if
              line.startswith("data: ")]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added = [e["output_index"] for e in events if e["type"] == "response.output_item.added"]
    assert added == [0, 1, 2]


def test_a_failure_closes_what_is_open():
    builder = _builder()
    builder.begin()
    builder.add(Text(0, "half"))
    kinds = [kind for kind, _ in builder.fail("engine_unavailable", "gone")]
    assert kinds[-1] == "response.failed"
    assert builder.response.output[0].status == "incomplete"
    assert builder.response.error.code == "engine_unavailable"
