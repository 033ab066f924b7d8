"""Request and answer bodies of OpenAI's Responses API as `msgspec` structs.

Input items are one struct with optional fields: their kinds overlap and clients leave `type` out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mxn.serve.openai.types import Fraction, NumLogprobs, Temperature

# 16 is OpenAI's smallest; smaller ones do no harm here.
MaxOutputTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]

_Key = Annotated[str, Meta(max_length=64)]
_Value = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Meta(max_length=16)]


class InputPart(Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct, kw_only=True, omit_defaults=True):
    """A message, a function call, its output, a piece of reasoning, or a reference to one."""

    type: str | None = None  # None: a message
    id: str | None = None
    status: str | None = None
    role: str | None = None  # message
    content: str | list[InputPart] | None = None  # message, reasoning
    call_id: str | None = None  # function_call, function_call_output
    name: str | None = None  # function_call
    arguments: str | None = None  # function_call
    output: str | list[InputPart] | None = None  # function_call_output
    summary: list[InputPart] | None = None  # reasoning


class Reasoning(Struct, frozen=True, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class TextOptions(Struct, frozen=True, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class StreamOptions(Struct, kw_only=True):
    include_obfuscation: bool | None = None


class InputTokensRequest(Struct, kw_only=True):
    """What a model reads before it answers."""

    model: str | None = None
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    truncation: str | None = None


class ResponseRequest(InputTokensRequest, kw_only=True):
    max_output_tokens: MaxOutputTokens | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_logprobs: NumLogprobs | None = None
    max_tool_calls: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None


class InputTokens(Struct, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class MessageItem(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"] = "completed"
    content: list[OutputText] = []


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[dict[str, Any]] = []
    content: list[ReasoningText] = []
    status: Literal["in_progress", "completed", "incomplete"] = "completed"


class FunctionCallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Literal["in_progress", "completed", "incomplete"] = "completed"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(Struct, kw_only=True):
    cached_tokens: int = 0


class OutputTokensDetails(Struct, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, kw_only=True):
    code: str
    message: str


class IncompleteDetails(Struct, kw_only=True):
    reason: Literal["max_output_tokens", "content_filter"]


class Response(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Status
    model: str
    output: list[OutputItem] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: Reasoning = Reasoning()
    service_tier: str | None = None
    store: bool = True
    background: bool = False
    temperature: float | None = None
    text: TextOptions = msgspec.field(default_factory=lambda: TextOptions(format={"type": "text"}))
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ItemList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
