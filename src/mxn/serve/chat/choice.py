"""One choice of an answer in the making: deltas of a replica in, chat events out.

Thoughts, calls and text are told apart here; a choice without tools and thoughts passes through.
Start at `ChoiceReader.read`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mxn.engine.protocol import Delta, TokenLogprob
from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat.dialect import Dialect
from mxn.serve.chat.events import (
    ChatEvent,
    Finished,
    FinishReason,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.chat.plan import ToolPlan
from mxn.serve.chat.reasoning import Begins, ReasoningCounter, ReasoningSplitter
from mxn.serve.chat.tools.formats import XmlFormat
from mxn.serve.chat.tools.parser import JsonToolParser, ToolParser
from mxn.serve.chat.tools.scanner import Piece
from mxn.serve.chat.tools.xml import XmlToolParser


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How all choices of a request are read. `cleans`: special tokens are in the text."""

    dialect: Dialect
    tools: ToolPlan
    begins: Begins
    cleans: bool
    shows_reasoning: bool
    tokenizer: Tokenizer

    @property
    def is_plain(self) -> bool:
        """Whether the text of a delta is the text of the answer."""
        return self.begins == "never" and not self.tools.parses and not self.cleans

    def parser(self) -> ToolParser | None:
        if not self.tools.parses:
            return None
        form = self.dialect.tools
        if isinstance(form, XmlFormat):
            return XmlToolParser(form, self.tools.schemas())
        return JsonToolParser(form, {function.name for function in self.tools.callable})


class ChoiceReader:
    """Reads the deltas of one choice."""

    def __init__(self, index: int, reading: Reading) -> None:
        self._index = index
        self._reading = reading
        self._parser = reading.parser()
        tags = reading.dialect.reasoning
        thinks = tags is not None and reading.begins != "never"
        self._splitter = ReasoningSplitter(tags, reading.begins) if tags and thinks else None
        self._counter = (
            ReasoningCounter(tags, reading.begins, reading.tokenizer) if tags and thinks else None
        )
        self._num_calls = 0
        self._is_over = False  # one call was allowed, and it has been made

    @property
    def reasoning_tokens(self) -> int:
        return self._counter.count if self._counter else 0

    def read(self, delta: Delta) -> list[ChatEvent]:
        """Return what a delta means. Its log-probabilities are on exactly one of the events."""
        if self._counter is not None and not self._counter.is_done:
            self._counter.feed(delta.token_ids)
        is_last = delta.finish_reason is not None
        events = self._events(delta.text, is_last=is_last)
        if delta.logprobs:
            events = _with_logprobs(events, self._index, delta.logprobs)
        made = list(events)
        if is_last:
            made.append(Finished(self._index, self._reason(delta), delta.stop_reason))
        return made

    def _events(self, text: str, *, is_last: bool) -> Iterator[ChatEvent]:
        if self._reading.cleans and text:
            text = self._reading.dialect.clean(text)
        if self._splitter is not None and not self._splitter.is_done:
            thought, text = self._splitter.feed(text)
            if is_last:
                more_thought, more_text = self._splitter.finish()
                thought, text = thought + more_thought, text + more_text
            if thought and self._reading.shows_reasoning:
                yield Reasoning(self._index, thought)
        if self._parser is None:
            if text:
                yield Text(self._index, text)
            return
        pieces = self._parser.feed(text) if text else []
        if is_last:
            pieces += self._parser.finish()
        yield from self._calls(pieces)

    def _calls(self, pieces: Iterable[Piece]) -> Iterator[ChatEvent]:
        for kind, text in pieces:
            if kind == "start":
                self._is_over = self._reading.tools.is_single and self._num_calls > 0
            if self._is_over:
                continue  # what follows the only call that was allowed is not shown
            if kind == "start":
                call_id = f"call_{uuid.uuid4().hex[:24]}"
                yield ToolCallStart(self._index, self._num_calls, call_id, text)
                self._num_calls += 1
            elif kind == "args":
                if text:
                    yield ToolCallArguments(self._index, self._num_calls - 1, text)
            else:
                yield Text(self._index, text)

    def _reason(self, delta: Delta) -> FinishReason:
        if delta.finish_reason == "length":
            return "length"
        return "tool_calls" if self._num_calls else "stop"


def _with_logprobs(
    events: Iterable[ChatEvent], index: int, logprobs: list[TokenLogprob]
) -> Iterator[ChatEvent]:
    """Put them on the first piece of text or thought, or on an empty one at the end."""
    is_open = True
    for item in events:
        if is_open and isinstance(item, Text | Reasoning):
            is_open = False
            yield type(item)(item.index, item.text, logprobs)
        else:
            yield item
    if is_open:
        yield Text(index, "", logprobs)
