"""What happens while a chat answer is made, before it is OpenAI's, Anthropic's or Responses' JSON.

A `ChatRun` yields events of all choices; each protocol writes its own shapes from the same events,
so text, tool calls and counts agree between protocols, streamed or not. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

from mxn.engine.protocol import TokenLogprob
from mxn.serve.openai.types import Usage

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Text(msgspec.Struct, frozen=True):
    """A piece of the answer. `text` may be empty where there are only log-probabilities."""

    index: int  # of the choice
    text: str
    logprobs: list[TokenLogprob] | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thinks before it answers."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class ToolCallStart(msgspec.Struct, frozen=True):
    """A tool call begins; its pieces of arguments follow with the same `call`."""

    index: int
    call: int  # 0, 1, … within the choice
    id: str
    name: str


class ToolCallArguments(msgspec.Struct, frozen=True):
    index: int
    call: int
    text: str  # a piece of the JSON text of the arguments


class Finished(msgspec.Struct, frozen=True):
    """The last event of a choice."""

    index: int
    reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or token id that ended it


ChatEvent = Text | Reasoning | ToolCallStart | ToolCallArguments | Finished


class ChatRun(Protocol):
    """One chat request under way, on our own engine or on another server."""

    id: str  # chatcmpl-…, the id of the answer and of its row in the ledger
    model: str
    created: int

    def events(self) -> AsyncGenerator[ChatEvent, None]:
        """Yield the events in order; closing it cancels the work. The usage row is settled before
        the last `Finished` comes out. Raises: MxnError, ApiError."""
        ...

    def usage(self) -> Usage:
        """The counts so far; final after the last event."""
        ...
