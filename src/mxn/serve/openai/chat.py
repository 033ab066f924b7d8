"""POST /v1/chat/completions: OpenAI's shapes of a chat run, streamed or whole.

Knows chat events and JSON; knows no replica, template or parser. Start at `ChatRoutes.create`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.engine.protocol import TokenLogprob
from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat.events import (
    ChatEvent,
    ChatRun,
    Finished,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.chat.run import start_chat
from mxn.serve.http import json_response, unless_gone
from mxn.serve.openai.logprobs import chat_logprobs
from mxn.serve.openai.stream import EventStream, event
from mxn.serve.openai.types import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    FunctionCallDelta,
    MadeToolCall,
    ToolCallDelta,
    Usage,
)
from mxn.serve.state import State


class ChatRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def create(self, request: Request) -> Response:
        body, model = await self._state.read(request, ChatRequest)
        run = await start_chat(self._state, body, model)
        logprobs = model.tokenizer if body.logprobs else None
        is_legacy = bool(body.functions) and not body.tools
        if not body.stream:
            whole = _whole(run, logprobs, body.n or 1, is_legacy=is_legacy)
            return json_response(await unless_gone(request, whole), model.headers)
        writer = _ChunkWriter(run, body, logprobs, is_legacy=is_legacy)
        return EventStream(
            writer.chunks(), headers=model.headers, heartbeat_s=self._state.settings.heartbeat_s
        )


async def _whole(
    run: ChatRun, logprobs: Tokenizer | None, num_choices: int, *, is_legacy: bool
) -> ChatCompletion:
    parts = [_Collector() for _ in range(num_choices)]
    async with aclosing(run.events()) as events:
        async for item in events:
            parts[item.index].add(item)
    return ChatCompletion(
        id=run.id,
        created=run.created,
        model=run.model,
        choices=[
            part.choice(index, logprobs, is_legacy=is_legacy) for index, part in enumerate(parts)
        ],
        usage=run.usage(),
    )


class _Collector:
    """The events of one choice, joined."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        self._entries: list[TokenLogprob] = []
        self._reason = "stop"

    def add(self, item: ChatEvent) -> None:
        if isinstance(item, Text):
            self._texts.append(item.text)
            self._entries.extend(item.logprobs or ())
        elif isinstance(item, Reasoning):
            self._thoughts.append(item.text)
            self._entries.extend(item.logprobs or ())
        elif isinstance(item, ToolCallStart):
            self._calls.append((item, []))
        elif isinstance(item, ToolCallArguments):
            self._calls[item.call][1].append(item.text)
        else:
            self._reason = item.reason

    def choice(self, index: int, logprobs: Tokenizer | None, *, is_legacy: bool) -> ChatChoice:
        text = "".join(self._texts)
        message = AssistantMessage(content=text if text or not self._calls else None)
        if thoughts := "".join(self._thoughts):
            message.reasoning_content = message.reasoning = thoughts
        made = [
            MadeToolCall(
                id=start.id,
                function=CalledFunction(name=start.name, arguments="".join(pieces)),
            )
            for start, pieces in self._calls
        ]
        if made and is_legacy:
            message.function_call = made[0].function
        elif made:
            message.tool_calls = made
        return ChatChoice(
            index=index,
            message=message,
            logprobs=_logprobs(logprobs, self._entries),
            finish_reason=_reason(self._reason, is_legacy=is_legacy),
        )


def _logprobs(tokenizer: Tokenizer | None, entries: list[TokenLogprob]) -> ChatLogprobs | None:
    return None if tokenizer is None else chat_logprobs(tokenizer, entries)


def _reason(reason: str, *, is_legacy: bool) -> str:
    return "function_call" if is_legacy and reason == "tool_calls" else reason


class _ChunkWriter:
    """The events of a run as bytes of `chat.completion.chunk` objects."""

    def __init__(
        self, run: ChatRun, body: ChatRequest, logprobs: Tokenizer | None, *, is_legacy: bool
    ) -> None:
        options = body.stream_options
        self._run = run
        self._wants_usage = bool(options and options.include_usage)
        self._counts_always = bool(options and options.continuous_usage_stats)
        self._tail = b',"usage":null}\n\n' if self._wants_usage else b"}\n\n"
        self._logprobs = logprobs
        self._is_legacy = is_legacy
        self._heads = [self._head(index) for index in range(body.n or 1)]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield role, pieces and finish of each choice, then usage if asked for."""
        has_begun = [False] * len(self._heads)
        encode, heads, tail = msgspec.json.encode, self._heads, self._tail
        is_plain = self._logprobs is None and not self._counts_always
        async with aclosing(self._run.events()) as events:
            async for item in events:
                index = item.index
                if is_plain and type(item) is Text and item.text:
                    # The hot path: one small encode between bytes that were made once.
                    data = b'%b%b},"logprobs":null,"finish_reason":null}]%b' % (
                        heads[index], encode(item.text), tail
                    )  # fmt: skip
                else:
                    data = self._write(item)
                if not has_begun[index]:
                    has_begun[index] = True
                    data = self._chunk(index, ChatDelta(role="assistant", content="")) + data
                if data:
                    yield data
        if self._wants_usage:
            yield event(self._bare([], self._run.usage()))

    def _write(self, item: ChatEvent) -> bytes:
        index = item.index
        if isinstance(item, Text | Reasoning):
            if not item.text and not item.logprobs:
                return b""  # the beginning of a choice: its role alone
            delta = ChatDelta()
            if isinstance(item, Text):
                delta.content = item.text
            else:
                delta.reasoning_content = delta.reasoning = item.text
            return self._chunk(
                index, delta, logprobs=_logprobs(self._logprobs, item.logprobs or [])
            )
        if isinstance(item, Finished):
            reason = _reason(item.reason, is_legacy=self._is_legacy)
            return self._chunk(index, ChatDelta(), reason)
        if isinstance(item, ToolCallStart):
            function = FunctionCallDelta(name=item.name, arguments="")
            call = ToolCallDelta(index=item.call, id=item.id, type="function", function=function)
        else:
            call = ToolCallDelta(index=item.call, function=FunctionCallDelta(arguments=item.text))
        if self._is_legacy:
            return self._chunk(index, ChatDelta(function_call=call.function))
        return self._chunk(index, ChatDelta(tool_calls=[call]))

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        reason: str | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        if self._counts_always:
            return event(self._bare([choice], self._run.usage()))
        return b"data: " + msgspec.json.encode(self._bare([choice]))[:-1] + self._tail

    def _bare(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        chunk = ChatChunk(
            id=self._run.id, created=self._run.created, model=self._run.model, choices=choices
        )
        if usage is not None:
            chunk.usage = usage
        return chunk

    def _head(self, index: int) -> bytes:
        """Return the bytes of a text chunk up to its content."""
        choice = ChatChunkChoice(index=index, delta=ChatDelta(content=""))
        chunk = b"data: " + msgspec.json.encode(self._bare([choice]))
        return chunk[: chunk.index(b'"content":""') + len(b'"content":')]
