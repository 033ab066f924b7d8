"""Answers of foreign servers as chat events, for protocols that write events of their own.

Start at `UpstreamChatRun`. Knows deltas of OpenAI's chat route; log-probabilities stay out, since
they have no token ids.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator

import msgspec

from mxn.serve.chat.events import (
    ChatEvent,
    Finished,
    FinishReason,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import Usage
from mxn.serve.replicas.pass_stream import settle_failed, usage_of
from mxn.serve.replicas.sse import Choice, clipped
from mxn.serve.replicas.upstream_run import UpstreamRun


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


_delta_decoder = msgspec.json.Decoder(_Delta | None)
_REASONS: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "tool_calls": "tool_calls",
    "function_call": "tool_calls", "content_filter": "content_filter",
}  # fmt: skip


class UpstreamChatRun:
    """A `ChatRun` over foreign servers. Its row is opened when its events begin."""

    def __init__(self, run: UpstreamRun, model: str) -> None:
        self._run = run
        self.id = run.plan.id
        self.model = model
        self.created = int(time.time())

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        """Yield events; the row is settled before the last `Finished` comes out."""
        run = self._run
        held: list[Finished] = []
        seen_calls: set[tuple[int, int]] = set()
        await run.begin()
        try:
            async with contextlib.aclosing(run.batches()) as batches:
                async for batch in batches:
                    for chunk in batch.chunks:
                        for choice in chunk.choices:
                            for item in _events_of(choice, seen_calls):
                                if isinstance(item, Finished):
                                    held.append(item)
                                else:
                                    yield item
            await run.settle("complete")
        except BaseException as exc:
            await settle_failed(run, exc)
            raise
        for finished in held:
            yield finished

    def usage(self) -> Usage:
        return usage_of(self._run.counts())


def _events_of(choice: Choice, seen_calls: set[tuple[int, int]]) -> list[ChatEvent]:
    try:
        delta = _delta_decoder.decode(choice.delta)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        message = f"The server of this model sent a delta of an unknown shape: {clipped(exc)}"
        raise ApiError(message, status=502, type="server_error", code="bad_upstream") from None
    index = choice.index
    out: list[ChatEvent] = []
    if delta is not None:
        thought = delta.reasoning_content or delta.reasoning
        if thought:
            out.append(Reasoning(index, thought))
        if delta.content:
            out.append(Text(index, delta.content))
        for call in delta.tool_calls or ():
            if (index, call.index) not in seen_calls:
                seen_calls.add((index, call.index))
                call_id = call.id or f"call_{uuid.uuid4().hex[:24]}"
                out.append(ToolCallStart(index, call.index, call_id, call.function.name or ""))
            if call.function.arguments:
                out.append(ToolCallArguments(index, call.index, call.function.arguments))
    if choice.finish_reason is not None:
        out.append(Finished(index, _REASONS.get(choice.finish_reason, "stop")))
    return out
