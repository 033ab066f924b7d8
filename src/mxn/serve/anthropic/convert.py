"""Anthropic's request as a chat request: the same conversation in OpenAI's words. Pure.

Start at `to_chat`. Raises ApiError for what no text model can do, such as images.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mxn.serve.anthropic.types import (
    Block,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    Thinking,
    Tool,
    ToolChoice,
)
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
)
from mxn.serve.openai.types import ToolChoice as ChatToolChoice


def to_chat(body: CountTokensRequest) -> ChatRequest:
    """Return the chat request that means the same."""
    messages = _system(body)
    for at, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{at}]")
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or ())] or None,
        tool_choice=_tool_choice(body.tool_choice),
        chat_template_kwargs=_template_kwargs(body.thinking),
        response_format=_response_format(body),
        # A conversation that ends with the assistant asks for the rest of that message.
        continue_final_message=body.messages[-1].role == "assistant" or None,
    )
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False
    if body.output_config is not None and body.output_config.effort is not None:
        chat.reasoning_effort = body.output_config.effort
    if isinstance(body, MessagesRequest):
        _add_sampling(chat, body)
    return chat


def _add_sampling(chat: ChatRequest, body: MessagesRequest) -> None:
    chat.max_tokens = body.max_tokens
    chat.stop = body.stop_sequences or None
    chat.stream = body.stream
    chat.temperature = body.temperature
    chat.top_p = body.top_p
    chat.top_k = body.top_k


def _system(body: CountTokensRequest) -> list[ChatMessage]:
    if not body.system:
        return []
    return [ChatMessage(role="system", content=_text(body.system, "system"))]


def _messages(message: InputMessage, param: str) -> list[ChatMessage]:
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    if message.role == "assistant":
        return [_assistant(message.content, f"{param}.content")]
    return _user(message.role, message.content, f"{param}.content")


def _user(role: str, blocks: list[Block], param: str) -> list[ChatMessage]:
    """Tool results become messages of their own, in front of what the user says."""
    results = [block for block in blocks if block.type == "tool_result"]
    said = [block for block in blocks if block.type != "tool_result"]
    messages = [
        ChatMessage(
            role="tool",
            tool_call_id=block.tool_use_id,
            content=_text(block.content or "", f"{param}.content"),
        )
        for block in results
    ]
    if said or not messages:
        messages.append(ChatMessage(role=role, content=_text(said, param)))
    return messages


def _assistant(blocks: list[Block], param: str) -> ChatMessage:
    calls = [
        ToolCall(
            id=block.id,
            function=FunctionCall(
                name=block.name or "", arguments=msgspec.json.encode(block.input or {}).decode()
            ),
        )
        for block in blocks
        if block.type == "tool_use"
    ]
    thoughts = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    # What Anthropic encrypted cannot be shown to another model; it is left out.
    skipped = ("tool_use", "thinking", "redacted_thinking")
    said = [block for block in blocks if block.type not in skipped]
    return ChatMessage(
        role="assistant",
        content=_text(said, param) if said else None,
        tool_calls=calls or None,
        reasoning_content=thoughts or None,
    )


def _text(content: str | list[Block], param: str) -> str:
    if isinstance(content, str):
        return content
    for at, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise ApiError(
                f"{param}[{at}]: a block of type {block.type!r} is not supported here; this model "
                "takes text.",
                param=f"{param}[{at}]",
            )
    return "\n".join(block.text or "" for block in content)


def _tool(tool: Tool, param: str) -> ChatTool:
    if tool.type not in (None, "custom"):
        raise ApiError(
            f"{param}: tools of type {tool.type!r} run on Anthropic's servers and are not offered.",
            param=param,
        )
    return ChatTool(
        function=FunctionDefinition(
            name=tool.name,
            description=tool.description,
            parameters=tool.input_schema or {"type": "object", "properties": {}},
            strict=tool.strict,
        )
    )


def _tool_choice(choice: ToolChoice | None) -> str | ChatToolChoice | None:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError("tool_choice of type 'tool' needs a name.", param="tool_choice.name")
        return ChatToolChoice(function=FunctionName(name=choice.name))
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _template_kwargs(thinking: Thinking | None) -> dict[str, Any] | None:
    if thinking is None:
        return None
    return {"enable_thinking": thinking.type != "disabled"}


def _response_format(body: CountTokensRequest) -> ResponseFormat | None:
    wanted = body.output_config.format if body.output_config else None
    if wanted is None:
        return None
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        raise ApiError(
            "output_config.format is {'type': 'json_schema', 'schema': {…}}.",
            param="output_config.format",
        )
    schema = JsonSchemaFormat(name="answer", schema=wanted["schema"], strict=True)
    return ResponseFormat(type="json_schema", json_schema=schema)
