"""How many tokens a foreign server's answer has: what it says if that can be, else what we saw.

Counts of a foreign server become money, so none is taken that cannot be true. Start at `Counter`
and `told_of`. Knows bodies of OpenAI's routes as far as they are counted; no server, no ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from mxn.ledger.types import CountBasis
from mxn.serve.replicas.sse import UpstreamUsage

BYTES_PER_TOKEN = 4  # of English text; where no tokenizer is known
MAX_COUNT = 2**31 - 1  # of tokens of one request that anybody may claim


@dataclass(frozen=True, slots=True)
class Told:
    """Counts of a server that can be true; None: it gave none, or one that cannot."""

    prompt: int | None = None
    cached: int = 0
    output: int | None = None
    reasoning: int = 0


def told_of(usage: UpstreamUsage, *, makes_tokens: bool = True) -> Told:
    """Return what can be true of a usage: 0 <= part <= whole <= `MAX_COUNT` for input and output.

    `makes_tokens` False: an answer without output, such as embeddings, need not count it.
    """
    prompt, cached = _whole_and_part(usage.prompt_tokens, usage.cached_tokens)
    said = usage.completion_tokens
    said = 0 if said is None and not makes_tokens else said
    output, reasoning = _whole_and_part(said, usage.reasoning_tokens)
    return Told(prompt, cached, output, reasoning)


def _whole_and_part(whole: Any, part: Any) -> tuple[int | None, int]:
    part = 0 if part is None else part
    if not _is_count(whole) or not _is_count(part) or part > whole:
        return None, 0
    return whole, part


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a request so far. `input` includes `cached`, `output` includes `reasoning`."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0
    basis: CountBasis = "events"


@dataclass(slots=True, kw_only=True)
class Counter:
    """Counts one answer, over all servers that took part in it."""

    input_estimate: int
    makes_tokens: bool = True
    num_events: int = 0  # with a piece of the answer; of a whole answer: its estimated tokens
    told: Told | None = None  # by the server that answers now
    _first: Told | None = None  # by the server that was lost in mid-answer
    _earlier: int = 0  # output tokens of servers that were lost
    _earlier_events: int = 0

    def hear(self, usage: UpstreamUsage) -> None:
        """Take a server's counts; the last ones hold."""
        self.told = told_of(usage, makes_tokens=self.makes_tokens)

    def move(self) -> None:
        """Note that another server goes on: what this one told holds for its own part only."""
        if self.num_events:
            made = self.counts(is_complete=False).output
            self._first = self._first or self.told
            self._earlier, self._earlier_events = made, self.num_events
        self.told = None

    def counts(self, *, is_complete: bool) -> Counts:
        """Return the counts so far.

        The count of an answer that was broken off may be an old one, so there at least each event
        counts. A count of nothing for an answer with words is none.
        """
        since = self.num_events - self._earlier_events
        told = self.told or Told()
        said = None if told.prompt is None else told.output
        if said is None or (is_complete and said == 0 and since):
            output, reasoning, is_exact = since, 0, False
        else:
            output = said if is_complete else max(said, since)
            reasoning, is_exact = told.reasoning, output == said and not self._earlier
        prompt, cached = self._input(told)
        output = min(self._earlier + output, MAX_COUNT)
        return Counts(prompt, cached, output, reasoning, "server" if is_exact else "events")

    def _input(self, told: Told) -> tuple[int, int]:
        """Return input and cached tokens; what was said goes into a later server's prompt."""
        if self._first is not None and self._first.prompt is not None:
            return self._first.prompt, self._first.cached
        if told.prompt is None:
            return self.input_estimate, 0
        prompt = max(0, told.prompt - self._earlier)
        return prompt, min(told.cached, prompt)


def measure(value: Any) -> tuple[int, int]:
    """Return how many prompts a field `prompt` or `input` holds, and about how many tokens.

    Token ids count one each. A list that mixes ids and texts is one prompt for some servers and
    several for others: the larger number is returned.
    """
    items = value if isinstance(value, list) else [value]
    num_prompts = sum(not isinstance(item, int) for item in items)
    return max(1, num_prompts), sum(_tokens(item) for item in items)


def _tokens(value: Any) -> int:
    if isinstance(value, list):
        return sum(_tokens(item) for item in value)
    if isinstance(value, int):
        return 1
    text = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
    return tokens_of_bytes(len(text))


def tokens_of_bytes(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


class _WholeChoice(msgspec.Struct):
    message: Any = None
    text: Any = None


_choices_decoder = msgspec.json.Decoder(list[_WholeChoice] | None)
_usage_decoder = msgspec.json.Decoder(UpstreamUsage | None)
_SPOKEN = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call")
_PARTS = ("text", "function", "name", "arguments", "content", "input", "custom")


def usage_in(fields: Mapping[str, msgspec.Raw]) -> UpstreamUsage | None:
    """Return the usage of a whole answer; None also where it has no shape of one."""
    try:
        return _usage_decoder.decode(fields["usage"]) if "usage" in fields else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def estimate(fields: Mapping[str, msgspec.Raw]) -> int:
    """Return about how many tokens a whole answer has: its texts, thoughts and tool calls.

    Raises: msgspec.MsgspecError, RecursionError for choices that are none.
    """
    if "choices" not in fields:
        return 0
    total = 0
    for choice in _choices_decoder.decode(fields["choices"]) or ():
        message = choice.message if isinstance(choice.message, dict) else {}
        total += _spoken(choice.text) + sum(_spoken(message.get(name)) for name in _SPOKEN)
    return total


def _spoken(value: Any) -> int:
    """Return about how many tokens the texts in a part of a message have."""
    if isinstance(value, str):
        return tokens_of_bytes(len(value.encode()))
    if isinstance(value, list):
        return sum(_spoken(item) for item in value)
    if isinstance(value, dict):
        return sum(_spoken(value.get(name)) for name in _PARTS)
    return 0
