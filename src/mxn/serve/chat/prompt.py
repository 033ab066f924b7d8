"""A conversation as prompt text: messages in OpenAI's words through the model's chat template.

Knows templates and message shapes; knows no sampling and no answers. Start at `render`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from mxn.errors import UserError
from mxn.serve.chat.dialect import Dialect, dialect_of
from mxn.serve.chat.fallback import instructed
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import ChatMessage, ChatRequest, ContentPart, ToolCall
from mxn.serve.served import ServedModel

# What `chat_template_kwargs` must not set: fields of their own, and Python's name for the renderer.
_TAKEN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "tokenize", "self")
# A template takes about 1 ms for this much; below it a thread costs more than it frees.
_INLINE_CHARS = 256 << 10
_VALUE_CHARS = 32
_SHORT_ID_CHARS = 9


async def render_aside(
    body: ChatRequest,
    model: ServedModel,
    dialect: Dialect,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """Return `render`'s text; a huge conversation goes through a thread, so that the loop lives."""
    if _is_small(body, tools):
        return render(body, model, tools, dialect)
    return await asyncio.to_thread(render, body, model, tools, dialect)


def _is_small(body: ChatRequest, tools: Sequence[dict[str, Any]] | None) -> bool:
    """Whether all that a template may look at is less than `_INLINE_CHARS`; stops counting there.

    A value counts as `_VALUE_CHARS`, which is what visiting it costs here and in a template.
    """
    left = _INLINE_CHARS
    # A stack, not recursion: a body may be nested more deeply than Python's own calls.
    todo: list[Any] = [body.chat_template_kwargs, body.documents, tools, body.messages]
    while todo:
        item = todo.pop()
        left -= len(item) if isinstance(item, str) else _VALUE_CHARS
        if left <= 0:
            return False
        if isinstance(item, msgspec.Struct):
            todo.extend(getattr(item, name) for name in item.__struct_fields__)
        elif isinstance(item, dict | list):
            if len(item) * _VALUE_CHARS >= left:
                return False
            todo.extend(item)
            if isinstance(item, dict):
                todo.extend(item.values())
    return True


def render(
    body: ChatRequest,
    model: ServedModel,
    tools: Sequence[dict[str, Any]] | None = None,
    dialect: Dialect | None = None,
) -> str:
    """Return a conversation as prompt text. Raises: UserError for template errors, ApiError."""
    try:
        return _render(body, model, tools, dialect or dialect_of(model))
    except RecursionError:
        raise ApiError("The messages are nested too deeply.", param="messages") from None


def _render(
    body: ChatRequest, model: ServedModel, tools: Sequence[dict[str, Any]] | None, dialect: Dialect
) -> str:
    continues = bool(body.continue_final_message)
    adds = body.add_generation_prompt
    messages = [_template_message(message, model, at) for at, message in enumerate(body.messages)]
    options = {
        **_variables(body),
        "add_generation_prompt": not continues if adds is None else adds,
        "continue_final_message": continues,
        "documents": body.documents,
    }
    if dialect.tools.has_short_ids:
        _shorten_ids(messages)
    if dialect.knows_tools:
        return model.tokenizer.render_chat(messages, **options, tools=tools)
    if not tools and not any(m["role"] == "tool" or m["tool_calls"] for m in messages):
        return model.tokenizer.render_chat(messages, **options)
    try:
        return model.tokenizer.render_chat(instructed(messages, tools), **options)
    except UserError:  # some templates refuse a system message
        in_user = instructed(messages, tools, into="user")
        return model.tokenizer.render_chat(in_user, **options)


def _shorten_ids(messages: Sequence[dict[str, Any]]) -> None:
    """Cut ids of calls to what a template takes; those of one call stay equal."""
    for message in messages:
        if message["tool_call_id"]:
            message["tool_call_id"] = _short(message["tool_call_id"])
        for call in message["tool_calls"] or ():
            call["id"] = _short(call.get("id") or "")


def _short(call_id: str) -> str:
    letters = re.sub(r"[^a-zA-Z0-9]", "", call_id)
    return letters[-_SHORT_ID_CHARS:].rjust(_SHORT_ID_CHARS, "0")


def _variables(body: ChatRequest) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    for name in _TAKEN_VARIABLES:
        if name in variables:
            raise ApiError(
                f"chat_template_kwargs must not hold {name!r}.", param="chat_template_kwargs"
            )
    return variables


def _template_message(message: ChatMessage, model: ServedModel, position: int) -> dict[str, Any]:
    """Return a message as templates expect it: content as text, arguments as objects."""
    out: dict[str, Any] = msgspec.structs.asdict(message)
    if message.role == "developer" and not model.tokenizer.templates.mentions("developer"):
        out["role"] = "system"  # the newer name of the same role
    if isinstance(message.content, list):
        out["content"] = _joined(message.content, f"messages[{position}].content")
    if message.role == "function":
        out["role"] = "tool"  # the older name of the same role
    if message.content is None:
        out["content"] = message.refusal
    calls = message.tool_calls
    if calls is None and message.function_call is not None:
        calls = [ToolCall(id=f"call_{position}", function=message.function_call)]
    del out["function_call"], out["refusal"]
    if calls is not None:
        out["tool_calls"] = [msgspec.to_builtins(call) for call in calls]
        for call in out["tool_calls"]:
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return out


def _joined(parts: list[ContentPart], param: str) -> str:
    for at, part in enumerate(parts):
        if part.type not in ("text", "input_text", "refusal") or part.text is None:
            raise ApiError(
                f"Content part {at} has type {part.type!r}; this model takes text parts only.",
                param=f"{param}[{at}]",
            )
    return "\n".join(part.text or "" for part in parts)


def _arguments(arguments: Any) -> Any:
    """Return a tool call's arguments as an object; text that is none stays what it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
