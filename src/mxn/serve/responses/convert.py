"""The Responses API's input as a chat request, and items of an answer as input again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import (
    ChatMessage,
    ChatRequest,
    ChatTool,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    ResponseFormat,
    ToolCall,
    ToolChoice,
)
from mxn.serve.responses.types import (
    FunctionCallItem,
    InputItem,
    InputPart,
    InputTokensRequest,
    MessageItem,
    OutputItem,
    ResponseRequest,
)

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def items_of(body: InputTokensRequest) -> list[InputItem]:
    """Return the input as items; a string is one message of the user."""
    if body.input is None:
        return []
    if isinstance(body.input, str):
        return [InputItem(type="message", role="user", content=body.input)]
    return body.input


def items_of_output(output: Sequence[OutputItem]) -> list[InputItem]:
    """Return an earlier answer as input; reasoning is not shown again."""
    items: list[InputItem] = []
    for item in output:
        if isinstance(item, MessageItem):
            parts = [InputPart(type="output_text", text=part.text) for part in item.content]
            items.append(InputItem(type="message", id=item.id, role="assistant", content=parts))
        elif isinstance(item, FunctionCallItem):
            items.append(
                InputItem(
                    type="function_call",
                    id=item.id,
                    call_id=item.call_id,
                    name=item.name,
                    arguments=item.arguments,
                )
            )
    return items


def to_chat(body: InputTokensRequest, items: Sequence[InputItem]) -> ChatRequest:
    """Return the chat request for `items`: those of earlier answers and the new ones.

    Raises: ApiError with `param` for items and tools that are not offered.
    """
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    for at, item in enumerate(items):
        _append(messages, item, f"input[{at}]")
    if not messages:
        raise ApiError("input is required and must not be empty.", param="input")
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or ())] or None,
        tool_choice=_tool_choice(body.tool_choice),
        response_format=_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    if body.parallel_tool_calls is not None:
        chat.parallel_tool_calls = body.parallel_tool_calls
    if isinstance(body, ResponseRequest):
        chat.max_completion_tokens = body.max_output_tokens
        chat.stream = body.stream  # whether the answer is paid for in pieces
        chat.temperature = body.temperature
        chat.top_p = body.top_p
        wants_logprobs = "message.output_text.logprobs" in (body.include or ())
        if wants_logprobs or body.top_logprobs:
            chat.logprobs = True
            chat.top_logprobs = body.top_logprobs
    return chat


def _append(messages: list[ChatMessage], item: InputItem, param: str) -> None:
    kind = item.type or "message"
    if kind == "message":
        if item.role is None:
            raise ApiError(f"{param}.role is required.", param=f"{param}.role")
        content = _text(item.content, f"{param}.content")
        messages.append(ChatMessage(role=item.role, content=content))
    elif kind == "function_call":
        call = ToolCall(
            id=item.call_id,
            function=FunctionCall(name=item.name or "", arguments=item.arguments or ""),
        )
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant":
            last.tool_calls = [*(last.tool_calls or ()), call]
        else:
            messages.append(ChatMessage(role="assistant", tool_calls=[call]))
    elif kind == "function_call_output":
        text = _text(item.output, f"{param}.output")
        messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=text))
    elif kind != "reasoning":  # earlier thoughts are not shown to the model again
        raise ApiError(f"{param}: items of type {kind!r} are not supported here.", param=param)


def _text(content: str | list[InputPart] | None, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for at, part in enumerate(content):
        if part.type not in (*_TEXT_PARTS, "refusal"):
            raise ApiError(
                f"{param}[{at}] has type {part.type!r}; this model takes text parts only.",
                param=f"{param}[{at}]",
            )
    return "\n".join(part.text or part.refusal or "" for part in content)


def _tool(tool: dict[str, Any], param: str) -> ChatTool:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ApiError(
            f"{param}: only tools of type 'function' with a name are offered, "
            f"got type {tool.get('type')!r}.",
            param=param,
        )
    try:
        return ChatTool(function=msgspec.convert(tool, FunctionDefinition))
    except msgspec.ValidationError as exc:
        raise ApiError(f"{param}: {exc}", param=param) from None


def _tool_choice(choice: str | dict[str, Any] | None) -> str | ToolChoice | None:
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            kind = choice.get("type")
            raise ApiError(f"tool_choice of type {kind!r} is not offered.", param="tool_choice")
        return ToolChoice(function=FunctionName(name=str(choice.get("name"))))
    return choice


def _format(body: InputTokensRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    try:
        if wanted.get("type") != "json_schema":
            return msgspec.convert(wanted, ResponseFormat)
        inner = msgspec.convert(wanted, JsonSchemaFormat)
    except msgspec.ValidationError as exc:
        raise ApiError(f"text.format: {exc}", param="text.format") from None
    return ResponseFormat(type="json_schema", json_schema=inner)
