"""The Responses answer from chat events: the object in the making, and its stream of events. Pure.

`Builder.add` takes one chat event, changes the response and returns what a stream says about it,
so that a streamed and a whole answer cannot differ.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from mxn.engine.protocol import TokenLogprob
from mxn.serve.chat.events import (
    ChatEvent,
    Finished,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.openai.types import Usage
from mxn.serve.responses.types import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
)

Logprobs = Callable[[list[TokenLogprob]], list[dict[str, Any]]]
Events = list[tuple[str, dict[str, Any]]]


def usage_of(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
        ),
        total_tokens=usage.total_tokens,
    )


class Builder:
    """Grows `response` event by event. `logprobs` None: they were not asked for."""

    def __init__(self, response: Response, logprobs: Logprobs | None = None) -> None:
        self.response = response
        self._logprobs = logprobs
        self._sequence = -1
        self._open: OutputItem | None = None

    def encode(self, events: Events) -> bytes:
        """Return events as bytes, numbered in order."""
        return b"".join(self._event(kind, fields) for kind, fields in events)

    def begin(self) -> Events:
        self.response.status = "in_progress"
        now = {"response": msgspec.to_builtins(self.response)}  # the object itself grows
        return [("response.created", now), ("response.in_progress", now)]

    def add(self, event: ChatEvent) -> Events:
        """Take one chat event of choice 0."""
        if isinstance(event, Text):
            return self._text(event) if event.text or event.logprobs else []
        if isinstance(event, Reasoning):
            return self._reasoning(event) if event.text else []
        if isinstance(event, ToolCallStart):
            item = FunctionCallItem(
                id=_new_id("fc"), call_id=event.id, name=event.name, status="in_progress"
            )
            return [*self._close(), *self._begin_item(item)]
        if isinstance(event, ToolCallArguments):
            return self._arguments(event.text)
        return self._finish(event)

    def end(self, usage: Usage) -> Events:
        """Close the response after the last event."""
        self.response.usage = usage_of(usage)
        return [(f"response.{self.response.status}", {"response": self.response})]

    def fail(self, code: str, message: str, usage: Usage | None = None) -> Events:
        events = self._close("incomplete")
        self.response.status = "failed"
        self.response.error = ResponseError(code=code, message=message)
        self.response.usage = usage_of(usage) if usage else None
        return [*events, ("response.failed", {"response": self.response})]

    def cancel(self, usage: Usage | None = None) -> None:
        self._close("incomplete")
        self.response.status = "cancelled"
        self.response.usage = usage_of(usage) if usage else None

    def _text(self, event: Text) -> Events:
        events: Events = []
        if not isinstance(self._open, MessageItem):
            item = MessageItem(id=_new_id("msg"), status="in_progress", content=[])
            events += [*self._close(), *self._begin_item(item)]
            item.content = [OutputText(text="", logprobs=[])]
            events.append(("response.content_part.added", self._part(item.content[0])))
        assert isinstance(self._open, MessageItem)
        part = self._open.content[0]
        logprobs = self._logprobs(event.logprobs or []) if self._logprobs else []
        part.text += event.text
        part.logprobs.extend(logprobs)
        delta = {"delta": event.text, "logprobs": logprobs}
        return [*events, ("response.output_text.delta", self._at(content_index=0, **delta))]

    def _reasoning(self, event: Reasoning) -> Events:
        events: Events = []
        if not isinstance(self._open, ReasoningItem):
            item = ReasoningItem(id=_new_id("rs"), status="in_progress", content=[])
            events += [*self._close(), *self._begin_item(item)]
            item.content = [ReasoningText(text="")]
            events.append(("response.content_part.added", self._part(item.content[0])))
        assert isinstance(self._open, ReasoningItem)
        self._open.content[0].text += event.text
        delta = self._at(content_index=0, delta=event.text)
        return [*events, ("response.reasoning_text.delta", delta)]

    def _arguments(self, text: str) -> Events:
        assert isinstance(self._open, FunctionCallItem)
        self._open.arguments += text
        return [("response.function_call_arguments.delta", self._at(delta=text))]

    def _finish(self, event: Finished) -> Events:
        is_whole = event.reason in ("stop", "tool_calls")
        events = self._close("completed" if is_whole else "incomplete")
        if is_whole:
            self.response.status = "completed"
            return events
        self.response.status = "incomplete"
        reason = "max_output_tokens" if event.reason == "length" else "content_filter"
        self.response.incomplete_details = IncompleteDetails(reason=reason)
        return events

    def _begin_item(self, item: OutputItem) -> Events:
        self._open = item
        self.response.output = [*self.response.output, item]
        # As it is now: the same object grows until it is done.
        fields = {"output_index": self._index, "item": msgspec.to_builtins(item)}
        return [("response.output_item.added", fields)]

    def _close(self, status: Any = "completed") -> Events:
        item = self._open
        if item is None:
            return []
        events: Events = []
        if isinstance(item, MessageItem):
            part = item.content[0]
            done = self._at(content_index=0, text=part.text, logprobs=part.logprobs)
            events.append(("response.output_text.done", done))
            events.append(("response.content_part.done", self._part(part)))
        elif isinstance(item, ReasoningItem):
            part = item.content[0]
            done = self._at(content_index=0, text=part.text)
            events.append(("response.reasoning_text.done", done))
            events.append(("response.content_part.done", self._part(part)))
        else:
            done = self._at(arguments=item.arguments, name=item.name)
            events.append(("response.function_call_arguments.done", done))
        item.status = status
        events.append(("response.output_item.done", {"output_index": self._index, "item": item}))
        self._open = None
        return events

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _at(self, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": self._index, **fields}

    def _part(self, part: OutputText | ReasoningText) -> dict[str, Any]:
        return self._at(content_index=0, part=msgspec.to_builtins(part))

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        self._sequence += 1
        body = {"type": kind, "sequence_number": self._sequence, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(body))


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
