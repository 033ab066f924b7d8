"""The Messages API through Anthropic's own client, and its conversions."""

from __future__ import annotations

import json

import anthropic
import pytest

from mxn.serve.anthropic.answer import Collector, EventWriter
from mxn.serve.anthropic.convert import to_chat
from mxn.serve.anthropic.types import Block, InputMessage, MessagesRequest, Tool, ToolChoice
from mxn.serve.chat.events import (
    Finished,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)

HELLO = [{"role": "user", "content": "hello there"}]
USAGE = Usage(
    prompt_tokens=10,
    completion_tokens=4,
    total_tokens=14,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=3),
    completion_tokens_details=CompletionTokensDetails(),
)
EVENTS = [
    Reasoning(0, "hm"),
    Reasoning(0, "m"),
    Text(0, "so"),
    Text(0, ": "),
    ToolCallStart(0, 0, "call_1", "look"),
    ToolCallArguments(0, 0, '{"at"'),
    ToolCallArguments(0, 0, ": 3}"),
    ToolCallStart(0, 1, "call_2", "go"),
    ToolCallArguments(0, 1, "{}"),
    Finished(0, "tool_calls"),
]


@pytest.fixture
def client(server_url):
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_and_its_stream_say_the_same(client):
    asked = {"model": "echo", "max_tokens": 12, "messages": HELLO, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    assert whole.id.startswith("msg_")
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == 12
    assert final.stop_reason == "max_tokens"


def test_counted_tokens_are_those_that_are_billed(client):
    count = client.messages.count_tokens(model="echo", messages=HELLO, system="be brief")
    made = client.messages.create(model="echo", messages=HELLO, system="be brief", max_tokens=1)
    assert count.input_tokens == made.usage.input_tokens + made.usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(client):
    made = client.messages.create(
        model="echo", messages=HELLO, max_tokens=200, stop_sequences=["the"]
    )
    assert made.stop_reason == "stop_sequence"
    assert made.stop_sequence == "the"
    assert "the" not in made.content[0].text


def test_errors_have_the_shape_of_this_protocol(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", messages=HELLO, max_tokens=1)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]
    assert caught.value.body["request_id"] == caught.value.request_id
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="echo", messages=[], max_tokens=1)
    assert caught.value.body["type"] == "error"
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(
            model="echo", messages=[{"role": "user", "content": [image]}], max_tokens=1
        )


def test_a_replica_that_dies_in_mid_stream_ends_it_with_an_error_event(client):
    asked = {"model": "broken", "max_tokens": 12, "messages": HELLO}
    with pytest.raises(anthropic.APIStatusError), client.messages.stream(**asked) as stream:
        for _ in stream:
            pass


def test_blocks_become_chat_messages():
    body = MessagesRequest(
        model="m",
        max_tokens=5,
        system=[Block(type="text", text="rules")],
        messages=[
            InputMessage(role="user", content="look"),
            InputMessage(
                role="assistant",
                content=[
                    Block(type="thinking", thinking="hm", signature="x"),
                    Block(type="text", text="I look"),
                    Block(type="tool_use", id="t1", name="look", input={"at": 1}),
                ],
            ),
            InputMessage(
                role="user",
                content=[
                    Block(type="tool_result", tool_use_id="t1", content="nothing"),
                    Block(type="text", text="again"),
                ],
            ),
        ],
        tools=[Tool(name="look", input_schema={"type": "object"})],
        tool_choice=ToolChoice(type="any", disable_parallel_tool_use=True),
    )
    chat = to_chat(body)
    assert [message.role for message in chat.messages] == [
        "system", "user", "assistant", "tool", "user",
    ]  # fmt: skip
    assistant = chat.messages[2]
    assert assistant.reasoning_content == "hm"
    assert assistant.tool_calls[0].function.arguments == '{"at":1}'
    assert chat.messages[3].tool_call_id == "t1"
    assert chat.tool_choice == "required"
    assert chat.parallel_tool_calls is False
    assert chat.max_tokens == 5


def test_a_prefilled_answer_is_continued():
    messages = [
        InputMessage(role="user", content="a"),
        InputMessage(role="assistant", content="so"),
    ]
    assert to_chat(
        MessagesRequest(model="m", max_tokens=1, messages=messages)
    ).continue_final_message


def test_a_tool_of_anthropics_own_is_refused():
    body = MessagesRequest(
        model="m",
        max_tokens=1,
        messages=[InputMessage(role="user", content="a")],
        tools=[Tool(name="w", type="web_search_20250305")],
    )
    with pytest.raises(ApiError, match="web_search"):
        to_chat(body)


def test_events_and_the_whole_message_have_the_same_blocks():
    collector, writer = Collector(), EventWriter("msg_1", "m")
    data = writer.start(USAGE)
    for event in EVENTS:
        collector.add(event)
        data += writer.write(event, USAGE)
    message = collector.message("msg_1", "m", USAGE)
    assert [type(block).__name__ for block in message.content] == [
        "ThinkingBlock", "TextBlock", "ToolUseBlock", "ToolUseBlock",
    ]  # fmt: skip
    assert message.content[2].input == {"at": 3}
    assert message.stop_reason == "tool_use"
    assert message.usage.input_tokens == 7
    assert message.usage.cache_read_input_tokens == 3
    events = [json.loads(part.split("data: ")[1]) for part in data.decode().split("\n\n")[:-1]]
    opened = [event["index"] for event in events if event["type"] == "content_block_start"]
    closed = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert opened == closed == [0, 1, 2, 3]
    parts = [
        event["delta"]["partial_json"]
        for event in events
        if event["type"] == "content_block_delta" and event["index"] == 2
    ]
    assert "".join(parts) == '{"at": 3}'
    assert events[-1]["type"] == "message_stop"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_arguments_that_were_cut_off_are_handed_over():
    collector = Collector()
    for event in (
        ToolCallStart(0, 0, "c", "f"),
        ToolCallArguments(0, 0, '{"a'),
        Finished(0, "length"),
    ):
        collector.add(event)
    message = collector.message("m", "m", USAGE)
    assert message.content[0].input == {"partial_json": '{"a'}
    assert message.stop_reason == "max_tokens"
