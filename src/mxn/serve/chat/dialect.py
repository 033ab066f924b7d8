"""How one model talks: its tool calls, its thoughts, and its special tokens. Made once per model.

Start at `dialect_of`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat.reasoning import Tags, reasoning_tags
from mxn.serve.chat.tools.formats import ToolFormat, tool_format
from mxn.serve.served import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """`knows_tools`: the chat template takes `tools`; without it a general instruction does."""

    tools: ToolFormat
    knows_tools: bool
    reasoning: Tags | None
    special_marks: frozenset[str]  # of tools and reasoning, which decoding would drop
    dropped: re.Pattern[str] | None  # special tokens that no reader should see

    def hides(self, *marks: str) -> bool:
        """Return whether one of `marks` is a special token, which decoding would drop."""
        return any(mark in self.special_marks for mark in marks)

    def clean(self, text: str) -> str:
        """Return text that was decoded with special tokens, without those that are no marks."""
        return text if self.dropped is None else self.dropped.sub("", text)


_known: WeakKeyDictionary[Tokenizer, dict[tuple[str | None, str | None], Dialect]] = (
    WeakKeyDictionary()
)


def dialect_of(
    model: ServedModel, tool_parser: str | None = None, reasoning_parser: str | None = None
) -> Dialect:
    """Return a model's dialect; the names override what its files say. Raises: ConfigError."""
    found = _known.setdefault(model.tokenizer, {})
    key = (tool_parser, reasoning_parser)
    if key not in found:
        found[key] = _dialect(model, tool_parser, reasoning_parser)
    return found[key]


def _dialect(model: ServedModel, tool_parser: str | None, reasoning_parser: str | None) -> Dialect:
    tokenizer = model.tokenizer
    mentions = tokenizer.templates.mentions
    tools = tool_format(tool_parser, mentions, model.info.family)
    reasoning = reasoning_tags(reasoning_parser, tokenizer)
    marks = set(tools.markers())
    if reasoning is not None:
        marks |= {reasoning.opens, reasoning.closes}
    special = {
        tokenizer.token_bytes(token_id).decode(errors="replace")
        for token_id in tokenizer.special_ids
    }
    dropped = sorted(special - marks - {""}, key=len, reverse=True)
    return Dialect(
        tools=tools,
        knows_tools=mentions("tools"),
        reasoning=reasoning,
        special_marks=frozenset(special & marks),
        dropped=re.compile("|".join(map(re.escape, dropped))) if dropped else None,
    )
