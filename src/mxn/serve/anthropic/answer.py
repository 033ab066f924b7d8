"""Anthropic's answer from chat events: one `Message`, or the stream of named events. Pure.

Blocks follow each other: a new kind of content closes the open block. Start at `Collector` for a
whole message and `EventWriter` for a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from mxn.serve.anthropic.types import (
    Message,
    MessageUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from mxn.serve.chat.events import (
    ChatEvent,
    Finished,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.openai.types import Usage

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def usage_of(usage: Usage) -> MessageUsage:
    """Split input into what was computed and what came from the prefix cache."""
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )


def stop_of(event: Finished) -> tuple[StopReason, str | None]:
    """Return stop_reason and stop_sequence."""
    if event.reason == "tool_calls":
        return "tool_use", None
    if event.reason == "length":
        return "max_tokens", None
    if event.reason == "content_filter":
        return "refusal", None
    if isinstance(event.stop_reason, str):
        return "stop_sequence", event.stop_reason
    return "end_turn", None


class Collector:
    """Gathers the events of choice 0 into content blocks."""

    def __init__(self) -> None:
        self._blocks: list[tuple[str, list[str], ToolCallStart | None]] = []
        self._end: Finished | None = None

    def add(self, event: ChatEvent) -> None:
        if isinstance(event, Text | Reasoning):
            kind = "text" if isinstance(event, Text) else "thinking"
            if not event.text:
                return
            if not self._blocks or self._blocks[-1][0] != kind:
                self._blocks.append((kind, [], None))
            self._blocks[-1][1].append(event.text)
        elif isinstance(event, ToolCallStart):
            self._blocks.append(("tool_use", [], event))
        elif isinstance(event, ToolCallArguments):
            self._blocks[-1][1].append(event.text)
        else:
            self._end = event

    def message(self, message_id: str, model: str, usage: Usage) -> Message:
        reason, sequence = stop_of(self._end) if self._end else (None, None)
        return Message(
            id=message_id,
            content=[_block(*block) for block in self._blocks],
            model=model,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=usage_of(usage),
        )


def _block(
    kind: str, pieces: list[str], call: ToolCallStart | None
) -> TextBlock | ThinkingBlock | ToolUseBlock:
    text = "".join(pieces)
    if call is not None:
        return ToolUseBlock(id=call.id, name=call.name, input=_input(text))
    return TextBlock(text=text) if kind == "text" else ThinkingBlock(thinking=text)


def _input(text: str) -> dict[str, Any]:
    """Return arguments as an object; a text cut off by max_tokens is handed over as it is."""
    try:
        value = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {"partial_json": text}
    return value if isinstance(value, dict) else {"value": value}


class EventWriter:
    """Turns chat events into bytes of named server-sent events."""

    def __init__(self, message_id: str, model: str) -> None:
        self._message_id = message_id
        self._model = model
        self._num_blocks = 0
        self._open: str | None = None  # the kind of the block that is open

    def start(self, usage: Usage) -> bytes:
        first = msgspec.structs.replace(usage_of(usage), output_tokens=0)
        message = Message(
            id=self._message_id,
            content=[],
            model=self._model,
            stop_reason=None,
            stop_sequence=None,
            usage=first,
        )
        return _event("message_start", {"message": message})

    def write(self, event: ChatEvent, usage: Usage) -> bytes:
        """Return the events that one chat event becomes; nothing for an empty piece."""
        return b"".join(self._events(event, usage))

    def _events(self, event: ChatEvent, usage: Usage) -> Iterator[bytes]:
        if isinstance(event, Text):
            if event.text:
                yield from self._piece("text", TextBlock(text=""), "text_delta", "text", event.text)
        elif isinstance(event, Reasoning):
            if event.text:
                block = ThinkingBlock(thinking="")
                yield from self._piece("thinking", block, "thinking_delta", "thinking", event.text)
        elif isinstance(event, ToolCallStart):
            yield from self._close()
            yield self._begin("tool_use", ToolUseBlock(id=event.id, name=event.name, input={}))
        elif isinstance(event, ToolCallArguments):
            yield self._delta("input_json_delta", "partial_json", event.text)
        else:
            yield from self._end(event, usage)

    def _piece(
        self, kind: str, block: TextBlock | ThinkingBlock, delta: str, field: str, text: str
    ) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close()
            yield self._begin(kind, block)
        yield self._delta(delta, field, text)

    def _begin(self, kind: str, block: TextBlock | ThinkingBlock | ToolUseBlock) -> bytes:
        self._open = kind
        index = self._num_blocks
        self._num_blocks += 1
        return _event("content_block_start", {"index": index, "content_block": block})

    def _delta(self, kind: str, field: str, text: str) -> bytes:
        delta = {"type": kind, field: text}
        return _event("content_block_delta", {"index": self._num_blocks - 1, "delta": delta})

    def _close(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", "signature", "")
        yield _event("content_block_stop", {"index": self._num_blocks - 1})
        self._open = None

    def _end(self, event: Finished, usage: Usage) -> Iterator[bytes]:
        yield from self._close()
        reason, sequence = stop_of(event)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield _event("message_delta", {"delta": delta, "usage": usage_of(usage)})
        yield _event("message_stop", {})


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    data = msgspec.json.encode({"type": kind, **fields})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
