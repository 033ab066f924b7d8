"""POST /v1/chat/completions. Messages through the model's template, tokens out, streamed or whole.

Start at `ChatRoutes.create`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.engine.protocol import SamplingParams, TokenLogprob
from mxn.serve.http import json_response, unless_gone
from mxn.serve.openai.errors import ApiError, not_supported
from mxn.serve.openai.generation import Job, build_sampling, check_prompt
from mxn.serve.openai.logprobs import chat_logprobs
from mxn.serve.openai.stream import EventStream, event
from mxn.serve.openai.types import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ContentPart,
)
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id, require_kind

# What `chat_template_kwargs` must not set: fields of their own, and Python's name for the renderer.
_TAKEN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "tokenize", "self")


class ChatRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def create(self, request: Request) -> Response:
        body, model = await self._state.read(request, ChatRequest)
        require_kind(model, "decoder")
        _refuse_unsupported(body)
        prompt_ids = await _prompt_ids(body, model)
        max_tokens = _max_tokens(body, is_lenient=self._state.settings.is_lenient)
        check_prompt(prompt_ids, model.info, max_tokens=max_tokens, param="messages")
        job_id = new_id("chatcmpl")
        job = Job.create(
            model,
            self._state.metrics.model(model.name),
            job_id=job_id,
            prompts=[prompt_ids],
            sampling=_sampling(body, model, max_tokens),
            num_choices=body.n or 1,
        )
        answer = _Answer(job_id, model, job, wants_logprobs=bool(body.logprobs))
        if not body.stream:
            completion = await unless_gone(request, answer.whole())
            return json_response(completion, model.headers)
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(
            answer.events(wants_usage=wants_usage),
            headers=model.headers,
            heartbeat_s=self._state.settings.heartbeat_s,
        )


def _refuse_unsupported(body: ChatRequest) -> None:
    """Refuse what would change the answer and is not there; ignoring it would be a lie."""
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise not_supported("response_format", f"response_format {kind!r}")
    if body.tools and body.tool_choice != "none":
        raise not_supported("tools", "Calling tools")
    if body.functions and body.function_call != "none":
        raise not_supported("functions", "Calling functions")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")


def _max_tokens(body: ChatRequest, *, is_lenient: bool) -> int | None:
    """Return the limit; the newer field wins when both are sent."""
    newer = body.max_completion_tokens is not None
    value = body.max_completion_tokens if newer else body.max_tokens
    if value == 0:
        if is_lenient:
            return None
        param = "max_completion_tokens" if newer else "max_tokens"
        raise ApiError(f"{param} is at least 1, got 0.", param=param)
    return value


def _sampling(body: ChatRequest, model: ServedModel, max_tokens: int | None) -> SamplingParams:
    return build_sampling(
        body,
        model.defaults,
        model.info,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def _prompt_ids(body: ChatRequest, model: ServedModel) -> list[int]:
    return await model.encode(render(body, model), bool(body.add_special_tokens))


def render(body: ChatRequest, model: ServedModel) -> str:
    """Return a conversation as prompt text. Raises: UserError for template errors, ApiError."""
    try:
        return _render(body, model)
    except RecursionError:
        raise ApiError("The messages are nested too deeply.", param="messages") from None


def _render(body: ChatRequest, model: ServedModel) -> str:
    continues = bool(body.continue_final_message)
    adds = body.add_generation_prompt
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    for name in _TAKEN_VARIABLES:
        if name in variables:
            raise ApiError(
                f"chat_template_kwargs must not hold {name!r}.", param="chat_template_kwargs"
            )
    return model.tokenizer.render_chat(
        [_template_message(message, model, at) for at, message in enumerate(body.messages)],
        **{
            **variables,
            "add_generation_prompt": not continues if adds is None else adds,
            "continue_final_message": continues,
            "documents": body.documents,
        },
    )


def _template_message(message: ChatMessage, model: ServedModel, position: int) -> dict[str, Any]:
    """Return a message as templates expect it: content as text, arguments as objects."""
    out: dict[str, Any] = msgspec.structs.asdict(message)
    if message.role == "developer" and not model.tokenizer.templates.mentions("developer"):
        out["role"] = "system"  # the newer name of the same role
    if isinstance(message.content, list):
        out["content"] = _joined(message.content, f"messages[{position}].content")
    if message.tool_calls is not None:
        out["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
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


class _Answer:
    """One answer in the making, as a whole or as events; both join the same deltas."""

    def __init__(self, job_id: str, model: ServedModel, job: Job, *, wants_logprobs: bool) -> None:
        self._id = job_id
        self._model = model
        self._job = job
        self._wants_logprobs = wants_logprobs
        self._created = int(time.time())

    async def whole(self) -> ChatCompletion:
        count = len(self._job.requests)
        texts: list[list[str]] = [[] for _ in range(count)]
        entries: list[list[TokenLogprob]] = [[] for _ in range(count)]
        reasons = [""] * count
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                texts[index].append(delta.text)
                entries[index].extend(delta.logprobs or ())
                reasons[index] = delta.finish_reason or reasons[index]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content="".join(texts[index])),
                    logprobs=self._logprobs(entries[index]),
                    finish_reason=reasons[index],
                )
                for index in range(count)
            ],
            usage=self._job.usage(),
        )

    async def events(self, *, wants_usage: bool) -> AsyncGenerator[bytes, None]:
        """Yield role, text and finish events of each choice, then usage if asked for."""
        heads = [self._head(index) for index in range(len(self._job.requests))]
        tail = b',"usage":null}\n\n' if wants_usage else b"}\n\n"
        encode = msgspec.json.encode
        has_begun = [False] * len(heads)
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                parts = []
                if not has_begun[index]:
                    has_begun[index] = True
                    parts.append(self._chunk(index, ChatDelta(role="assistant", content=""), tail))
                if delta.text or (self._wants_logprobs and delta.token_ids):
                    # The hot path: one small encode between bytes that were made once.
                    logprobs = b"null"
                    if self._wants_logprobs:
                        logprobs = encode(self._logprobs(delta.logprobs or []))
                    parts.append(
                        b'%b%b},"logprobs":%b,"finish_reason":null}]%b'
                        % (heads[index], encode(delta.text), logprobs, tail)
                    )
                if delta.finish_reason is not None:
                    parts.append(self._chunk(index, ChatDelta(), tail, delta.finish_reason))
                if parts:
                    yield b"".join(parts)
        if wants_usage:
            chunk = ChatChunk(
                id=self._id,
                created=self._created,
                model=self._model.name,
                choices=[],
                usage=self._job.usage(),
            )
            yield event(chunk)

    def _chunk(self, index: int, delta: ChatDelta, tail: bytes, reason: str | None = None) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason)
        chunk = ChatChunk(
            id=self._id, created=self._created, model=self._model.name, choices=[choice]
        )
        return b"data: " + msgspec.json.encode(chunk)[:-1] + tail

    def _head(self, index: int) -> bytes:
        """Return the bytes of a text chunk up to its content."""
        chunk = self._chunk(index, ChatDelta(content=""), b"")
        return chunk[: chunk.index(b'"content":""') + len(b'"content":')]

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._model.tokenizer, entries) if self._wants_logprobs else None
