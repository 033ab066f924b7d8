"""Documents from files: plain text, or JSON lines in the shapes people train on.

A line that cannot be used is counted with its reason and skipped; the first few are kept for the
report. Knows no tokenizer. Start at `read_documents`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mxn.errors import ConfigError, NotFoundError

TextSplit = Literal["file", "paragraph", "line"]
TEXT_SPLITS: tuple[TextSplit, ...] = ("file", "paragraph", "line")
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson")
NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is learned."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows the prompt is learned."""

    prompt: str
    completion: str
    place: Place


@dataclass(frozen=True, slots=True)
class Chat:
    """The assistant's turns from message `first_target` on are learned."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    place: Place
    first_target: int = 0


Document = Text | Completion | Chat

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class BadLineError(ValueError):
    """A line that is no document; the text says why, in words that are the same for alike lines."""


@dataclass(slots=True)
class Skipped:
    """Lines that were left out: how many for which reason, and where the first of them are."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)  # (file:line, reason)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, place: Place, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((str(place), reason))

    def describe(self) -> str:
        """Return one line for people: ``3 lines skipped (a.jsonl:2 is not JSON; …)``."""
        if not self.count:
            return "no line skipped"
        what = "; ".join(f"{place} {reason}" for place, reason in self.examples)
        more = "; …" if self.count > len(self.examples) else ""
        return f"{self.count} line{'s' if self.count > 1 else ''} skipped ({what}{more})"


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files that `paths` name; a folder stands for its data files, in order of name.

    Raises: NotFoundError for what is not there; ConfigError for a file of another kind.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in TEXT_SUFFIXES + JSON_SUFFIXES)
            if not inside:
                raise NotFoundError(
                    f"the folder {path} has no data file",
                    hint=f"data files end in {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}",
                )
            found += inside
        elif not path.is_file():
            raise NotFoundError(f"there is no data file {path}")
        elif path.suffix not in TEXT_SUFFIXES + JSON_SUFFIXES:
            raise ConfigError(
                f"{path.name} is no data file that mxn knows",
                hint=f"data files end in {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}",
            )
        else:
            found.append(path)
    if not found:
        raise ConfigError("no data file is named")
    return found


def read_documents(files: Sequence[Path], split: TextSplit, skipped: Skipped) -> Iterator[Document]:
    """Yield all documents in order; bad lines go to `skipped`.

    `split`: what a document of a plain text file is.
    """
    if split not in TEXT_SPLITS:
        raise ConfigError(f"documents {split!r} is none of {', '.join(TEXT_SPLITS)}")
    for file in files:
        reader = _json_lines(file, skipped) if file.suffix in JSON_SUFFIXES else None
        yield from reader or _texts(file, split, skipped)


def _json_lines(file: Path, skipped: Skipped) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            place = Place(file.name, number)
            try:
                yield parse_line(raw, place)
            except BadLineError as error:
                skipped.add(place, str(error))


def parse_line(raw: bytes, place: Place) -> Document:
    """Return the document of one JSON line. Raises: BadLineError."""
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadLineError("is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise BadLineError("is not JSON") from None
    except ValueError:  # what Python says of an integer of more than 4,300 digits
        raise BadLineError("has a number that is too long") from None
    if _HALF.search(raw) and not _is_text(data):
        raise BadLineError("has half of a character")
    if not isinstance(data, dict):
        raise BadLineError(f"is a JSON {type(data).__name__}, not an object")
    if "messages" in data:
        return _chat(data, data["messages"], place, 0)
    if "prompt" in data and "completion" in data:
        return _pair(data, place)
    if "text" in data:
        if not isinstance(data["text"], str) or not data["text"]:
            raise BadLineError("has an empty or odd text")
        return Text(data["text"], place)
    raise BadLineError("has neither text, messages, nor prompt and completion")


def _is_text(data: Any) -> bool:
    """Whether all strings can be written: JSON may spell halves of a surrogate pair."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _pair(data: dict[str, Any], place: Place) -> Document:
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(data, [*prompt, *completion], place, len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise BadLineError("has an empty or odd prompt or completion")
    return Completion(prompt, completion, place)


def _chat(data: dict[str, Any], messages: Any, place: Place, first_target: int) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise BadLineError("has no messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadLineError("has a message without a role")
        if "content" not in message and "tool_calls" not in message:
            raise BadLineError("has a message without content")
        if not isinstance(message.get("content", ""), str | list | None):
            raise BadLineError("has a message with odd content")
    if not any(message["role"] == "assistant" for message in messages[first_target:]):
        raise BadLineError("has no turn of the assistant")
    tools = data.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadLineError("has odd tools")
    return Chat(tuple(messages), tuple(tools) if tools else None, place, first_target)


def _texts(file: Path, split: TextSplit, skipped: Skipped) -> Iterator[Text]:
    if split == "file":
        place = Place(file.name, 1)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped.add(place, "is not UTF-8")
            return
        if text.strip():
            yield Text(text, place)
        return
    lines: list[str] = []
    begin = 1
    with file.open("rb") as raw_lines:
        for number, raw in enumerate(raw_lines, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                skipped.add(Place(file.name, number), "is not UTF-8")
                continue
            if split == "line" and line.strip():
                yield Text(line.rstrip("\r\n"), Place(file.name, number))
            elif split == "paragraph":
                if line.strip():
                    begin = number if not lines else begin
                    lines.append(line)
                elif lines:
                    yield Text("".join(lines).rstrip("\r\n"), Place(file.name, begin))
                    lines = []
    if lines:
        yield Text("".join(lines).rstrip("\r\n"), Place(file.name, begin))
