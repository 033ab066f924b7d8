"""Tools for models whose chat template knows none: an instruction in the system prompt.

The words are those most models have seen in training: definitions between `<tools>` tags, calls
between `<tool_call>` tags, results between `<tool_response>` tags. With `tool_choice` required or a
named function the grammar makes even a model call that has never seen a tool. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

INSTRUCTION = """You may call functions. Their signatures are between the tools tags:
<tools>
{tools}
</tools>
To call one, write its name and an object of arguments between tool_call tags:
<tool_call>
{{"name": "the function", "arguments": {{}}}}
</tool_call>"""


def instructed(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    into: str = "system",
) -> list[dict[str, Any]]:
    """Return messages without tool roles, with the instruction in the message of role `into`.

    A system message is made where there is none; for `into="user"` the first user message begins
    with it.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        made = _without_tools(message)
        if made["role"] == "user" and message["role"] == "tool" and _is_result(plain):
            plain[-1]["content"] += "\n" + made["content"]  # results of parallel calls
        else:
            plain.append(made)
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return _with_instruction(plain, INSTRUCTION.format(tools=listed), into)


def _is_result(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1] if messages else {}
    return last.get("role") == "user" and str(last.get("content")).endswith("</tool_response>")


def _without_tools(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = [message.get("content") or ""]
    written += [_written(call["function"]) for call in calls]
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    return {**rest, "content": "\n".join(text for text in written if text)}


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"] or {}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _with_instruction(
    messages: list[dict[str, Any]], instruction: str, into: str
) -> list[dict[str, Any]]:
    for at, message in enumerate(messages):
        if message["role"] == into:
            content = message.get("content") or ""
            parts = (content, instruction) if into == "system" else (instruction, content)
            joined = "\n\n".join(part for part in parts if part)
            return [*messages[:at], {**message, "content": joined}, *messages[at + 1 :]]
    return [{"role": into, "content": instruction}, *messages]
