"""What a model thinks before it answers: where it begins and ends, and how many tokens it has.

Knows tags and text; knows no tools. Start at `ReasoningSplitter` and `ReasoningCounter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mxn.errors import ConfigError
from mxn.models.tokenizer import Tokenizer

Begins = Literal["open", "perhaps", "never"]
"""Whether an answer begins inside of a thought, may begin one, or does not think."""


@dataclass(frozen=True, slots=True)
class Tags:
    """What a family writes around a thought."""

    opens: str
    closes: str


REASONING: dict[str, Tags] = {
    "think": Tags("<think>", "</think>"),  # DeepSeek R1 and V3.1, Qwen3, QwQ, GLM-4.5, Nemotron
    "mistral": Tags("[THINK]", "[/THINK]"),
    "granite": Tags("Here is my thought process:", "Here is my response:"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "kimi": Tags("◁think▷", "◁/think▷"),
    "exaone": Tags("<thought>", "</thought>"),
}


def check_reasoning_name(name: str) -> None:
    """Raises: ConfigError for tags that do not exist; `none` means that no model thinks."""
    known = (*REASONING, "none")
    if name not in known:
        raise ConfigError(f"unknown reasoning parser {name!r}; one of {', '.join(known)}")


def reasoning_tags(name: str | None, tokenizer: Tokenizer) -> Tags | None:
    """Return tags by `name`, else by what the chat template or the vocabulary holds.

    Raises: ConfigError for a name that does not exist.
    """
    if name is not None:
        check_reasoning_name(name)
        return REASONING.get(name)
    for tags in REASONING.values():
        if tokenizer.templates.mentions(tags.closes):
            return tags
    vocab = tokenizer.vocab()
    found = (tags for tags in REASONING.values() if tags.opens in vocab and tags.closes in vocab)
    return next(found, None)


def how_it_begins(prompt: str, tags: Tags | None, *, continues: bool = False) -> Begins:
    """Return what the end of a prompt says about the answer's thought."""
    if tags is None:
        return "never"
    tail = prompt.rstrip()
    if tail.endswith(tags.closes):
        return "never"
    opened, closed = prompt.rfind(tags.opens), prompt.rfind(tags.closes)
    if tail.endswith(tags.opens) or (continues and opened > closed):
        return "open"
    return "never" if continues else "perhaps"


class ReasoningSplitter:
    """Splits an answer in pieces of any size into (thought, answer).

    Line breaks beside the tags belong to them. A thought that never ends is all of the answer.
    """

    def __init__(self, tags: Tags, begins: Begins) -> None:
        self._tags = tags
        self._state: Callable[[bool], tuple[str, str]] = self._before
        if begins == "open":
            self._state = self._thinking
        elif begins == "never":
            self._state = self._answer
        self._buf = ""
        self._is_first = True  # no text of this state has been given out yet

    @property
    def is_done(self) -> bool:
        """Whether all that follows is the answer, unchanged."""
        return self._state == self._answer and not self._buf

    def feed(self, text: str) -> tuple[str, str]:
        """Return (piece of the thought, piece of the answer) that are decided now."""
        self._buf += text
        return self._run(is_final=False)

    def finish(self) -> tuple[str, str]:
        return self._run(is_final=True)

    def _run(self, *, is_final: bool) -> tuple[str, str]:
        thought = answer = ""
        while self._buf:
            state = self._state
            more_thought, more_answer = state(is_final)
            thought += more_thought
            answer += more_answer
            if self._state == state:
                break
        return thought, answer

    def _before(self, is_final: bool) -> tuple[str, str]:
        text = self._buf.lstrip()
        if text.startswith(self._tags.opens):
            self._buf = text[len(self._tags.opens) :]
            self._state = self._thinking
        elif is_final or not self._tags.opens.startswith(text):
            self._state = self._answer
        return "", ""

    def _thinking(self, is_final: bool) -> tuple[str, str]:
        if self._is_first:
            self._buf = self._buf.lstrip("\n")
        at = self._buf.find(self._tags.closes)
        if at >= 0:
            piece, self._buf = self._buf[:at], self._buf[at + len(self._tags.closes) :]
            self._state = self._after
            return piece.rstrip("\n"), ""
        keep = 0 if is_final else _overlap(self._buf, self._tags.closes)
        cut = len(self._buf) - keep
        if not is_final:
            cut = len(self._buf[:cut].rstrip("\n"))
        piece, self._buf = self._buf[:cut], self._buf[cut:]
        self._is_first = self._is_first and not piece
        return piece, ""

    def _after(self, is_final: bool) -> tuple[str, str]:
        self._buf = self._buf.lstrip("\n")
        if self._buf:
            self._state = self._answer
        return "", ""

    def _answer(self, is_final: bool) -> tuple[str, str]:
        piece, self._buf = self._buf, ""
        return "", piece


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` could begin `word`."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)


class ReasoningCounter:
    """Counts the tokens between the tags, by the bytes each token stands for.

    A token counts if it begins inside of the thought; the tokens of the tags do not.
    """

    def __init__(self, tags: Tags, begins: Begins, tokenizer: Tokenizer) -> None:
        self.count = 0
        self._open, self._close = tags.opens.encode(), tags.closes.encode()
        self._state = begins
        self._tokenizer = tokenizer
        self._data = b""  # the end of what was seen
        self._starts: list[int] = []  # where the counted tokens begin that reach into `_data`

    @property
    def is_done(self) -> bool:
        return self._state == "never"

    def feed(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self._state == "never":
                return
            data = self._tokenizer.token_bytes(token_id)
            if self._state == "perhaps":
                self._look_for_open(data)
            else:
                self._think(data)

    def _look_for_open(self, data: bytes) -> None:
        self._data = (self._data + data).lstrip()
        if self._data.startswith(self._open):
            # The rest of this token began inside the tag.
            self._data, self._state = self._data[len(self._open) :], "open"
        elif not self._open.startswith(self._data):
            self._state = "never"

    def _think(self, data: bytes) -> None:
        self._starts.append(len(self._data))
        self._data += data
        self.count += 1
        at = self._data.find(self._close)
        if at >= 0:
            self.count -= sum(start >= at for start in self._starts)
            self._state = "never"
            return
        drop = max(0, len(self._data) - len(self._close) + 1)
        self._data = self._data[drop:]
        self._starts = [start - drop for start in self._starts if start >= drop]
