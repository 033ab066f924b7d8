"""One JSON object that may be a call, read in pieces of any size.

The text of the arguments comes out exactly as the model wrote it, while it is being written. Knows
no markers around the object. Start at `CallScanner.feed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Literal

Piece = tuple[Literal["text", "start", "args"], str]
"""What a parser found: a piece of text, the name that begins a call, a piece of its arguments."""

Status = Literal["more", "done", "broken"]

_ROLES = {"name": "name", "arguments": "args", "parameters": "args", "function": "wrapper"}
_SPACE = " \t\r\n"
_CLOSERS = {"{": "}", "[": "]"}
_IN_STRING = re.compile(r'["\\]')
_IN_NESTED = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[,}\s]")


class _StringEnd:
    """Finds the quote that ends a string, also where a piece ends in the middle of an escape."""

    def __init__(self) -> None:
        self._is_escaped = False

    def find(self, text: str, at: int) -> int:
        """Return the place after the closing quote, or -1 while it has not come."""
        if self._is_escaped:
            self._is_escaped = False
            at += 1
        while match := _IN_STRING.search(text, at):
            if match[0] == '"':
                return match.end()
            if match.end() == len(text):
                self._is_escaped = True
                return -1
            at = match.end() + 1
        return -1


class ValueSpan:
    """Finds the end of an object or array by its brackets and strings; the text must begin it."""

    def __init__(self) -> None:
        self.status: Status = "more"
        self._closers: list[str] = []
        self._string: _StringEnd | None = None

    def feed(self, text: str, at: int) -> int:
        """Return the place up to which `text` belongs to the value."""
        while self.status == "more":
            if self._string is not None:
                end = self._string.find(text, at)
                if end < 0:
                    return len(text)
                self._string, at = None, end
            match = _IN_NESTED.search(text, at)
            if match is None:
                return len(text)
            at = self._pass(match[0], match.end())
        return at

    def _pass(self, char: str, end: int) -> int:
        if char == '"':
            self._string = _StringEnd()
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif char != self._closers.pop():
            self.status = "broken"
            return end - 1
        elif not self._closers:
            self.status = "done"
        return end


class CallScanner:
    """Reads `{"name": …, "arguments": {…}}`; the keys come in any order.

    Also `parameters` for the arguments, a wrapper `{"function": {…}}`, and arguments as a string
    that holds JSON. `names`: only these are calls, and only with arguments; it is for objects
    without a marker around them. The first piece must begin with the `{`.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.status: Status = "more"
        self.has_started = False
        self._names = names
        self._name: str | None = None
        self._out: list[Piece] = []
        self._read = self._read_open
        self._role = ""  # of the value that is read: name, args, wrapper or nothing of interest
        self._depth = 0  # 2 inside a wrapper
        self._token: list[str] = []  # of a key or a value that is needed as a whole
        self._string = _StringEnd()
        self._span = ValueSpan()
        self._arguments: list[str] | None = None  # those that came before the name

    def feed(self, text: str) -> tuple[int, list[Piece]]:
        """Return how many characters belong to the object, and what they mean."""
        at = 0
        while at < len(text) and self.status == "more":
            at = self._read(text, at)
        out, self._out = self._out, []
        return at, out

    def _read_open(self, text: str, at: int) -> int:
        self._depth += 1
        self._read = self._read_key
        return at + 1

    def _read_key(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._begin_string()
            self._read = self._read_key_text
        elif char == "}":
            return self._close(at)
        elif char not in _SPACE:
            return self._break(at)
        return at + 1

    def _read_key_text(self, text: str, at: int) -> int:
        end = self._read_string(text, at)
        if end < 0:
            return len(text)
        self._role = _ROLES.get(_decoded(self._token) or "", "")
        self._read = self._read_colon
        return end

    def _read_colon(self, text: str, at: int) -> int:
        if text[at] == ":":
            self._read = self._read_value
        elif text[at] not in _SPACE:
            return self._break(at)
        return at + 1

    def _read_value(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            return at + 1
        if char == "{" and self._role == "wrapper" and self._depth == 1:
            self._read = self._read_open
            return at
        if self._role == "wrapper":
            self._role = "name"  # {"function": "name", "parameters": {…}}
        if char == '"':
            self._begin_string()
            self._read = self._read_text
            return at + 1
        if char in _CLOSERS:
            self._span = ValueSpan()
            self._read = self._read_span
            return at
        self._token = []
        self._read = self._read_scalar
        return at

    def _begin_string(self) -> None:
        self._token = ['"']
        self._string = _StringEnd()

    def _read_string(self, text: str, at: int) -> int:
        end = self._string.find(text, at)
        self._token.append(text[at : len(text) if end < 0 else end])
        return end

    def _read_text(self, text: str, at: int) -> int:
        end = self._read_string(text, at)
        if end < 0:
            return len(text)
        self._read = self._read_comma
        if self._role == "name":
            name = _decoded(self._token)
            if not name:
                return self._break(end)
            self._name = name
            if self._arguments is not None:
                self._give("".join(self._arguments))
        elif self._role == "args":
            inner = _decoded(self._token) or ""
            self._give(inner if inner.lstrip().startswith("{") else "".join(self._token))
        return self._break(end) if self.status == "broken" else end

    def _read_span(self, text: str, at: int) -> int:
        end = self._span.feed(text, at)
        if self._role == "args":
            self._give(text[at:end])
        if self._span.status == "broken" or self.status == "broken":
            return self._break(end)
        if self._span.status == "done":
            self._read = self._read_comma
        return end

    def _read_scalar(self, text: str, at: int) -> int:
        match = _SCALAR_END.search(text, at)
        end = match.start() if match else len(text)
        self._token.append(text[at:end])
        if match is None:
            return end
        value = "".join(self._token)
        if not value or self._role == "name":
            return self._break(end)
        if self._role == "args":
            self._give("{}" if value == "null" else value)
        self._read = self._read_comma
        return self._break(end) if self.status == "broken" else end

    def _read_comma(self, text: str, at: int) -> int:
        char = text[at]
        if char == ",":
            self._read = self._read_key
        elif char == "}":
            return self._close(at)
        elif char not in _SPACE:
            return self._break(at)
        return at + 1

    def _close(self, at: int) -> int:
        self._depth -= 1
        self._read = self._read_comma
        if self._depth == 0:
            if not self.has_started and self._name is not None and self._names is None:
                self._give("{}")  # a call without arguments
            self.status = "done" if self.has_started else "broken"
        return at + 1

    def _give(self, piece: str) -> None:
        """Let a piece of the arguments out, once the name is known."""
        if self._name is None:
            self._arguments = [*(self._arguments or ()), piece]
            return
        if not self.has_started:
            if self._names is not None and self._name not in self._names:
                self.status = "broken"
                return
            self.has_started = True
            self._out.append(("start", self._name))
        self._out.append(("args", piece))

    def _break(self, at: int) -> int:
        self.status = "broken"
        return at


def _decoded(token: list[str]) -> str | None:
    """Return the text of a JSON string, or None for one that is not valid."""
    try:
        return json.loads("".join(token))
    except ValueError:
        return None
