"""Tool calls in a stream of text: markers, JSON between them, and text that stays text.

A state machine over a buffer: whatever the pieces are, the same calls and the same text come out.
What looked like a call and is none is given out as text. Start at `JsonToolParser`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Protocol

from mxn.serve.chat.tools.formats import JsonFormat
from mxn.serve.chat.tools.scanner import CallScanner, Piece, ValueSpan

_HEADER_CHARS = 512  # of a name and what stands around it
_SEPARATORS = ",;"
_SPACES = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:/-]+")


class ToolParser(Protocol):
    """Finds the calls of one answer."""

    def feed(self, text: str) -> list[Piece]:
        """Take the next piece of the answer, return what is decided."""
        ...

    def finish(self) -> list[Piece]:
        """Return the rest; the answer is over."""
        ...


class MarkerParser:
    """Text up to a marker, then a call, then text again; subclasses read the call.

    White space before the first call and around calls belongs to no text.
    """

    def __init__(self, opens: Collection[str]) -> None:
        self._opens = tuple(opens)
        self._open = re.compile("|".join(re.escape(mark) for mark in opens)) if opens else None
        self._state: Callable[[], bool] = self._lead
        self._buf = ""
        self._out: list[Piece] = []
        self._raw: list[str] = []  # taken from the buffer and not yet known to be a call
        self._is_final = False
        self._has_text = self._has_calls = False

    def feed(self, text: str) -> list[Piece]:
        self._buf += text
        while self._buf and self._state():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Piece]:
        self._is_final = True
        out = self.feed("")
        rest = "".join(self._raw) + self._buf
        self._raw, self._buf = [], ""
        if rest and not (self._has_calls and not rest.strip()):
            out.append(("text", rest))
        return out

    # States: each takes from the buffer and returns whether it is worth going on.

    def _lead(self) -> bool:
        """White space at the beginning or after a call."""
        self._take_space()
        if not self._buf:
            return False
        if not self._has_text and not self._has_calls and self._is_bare_call():
            return self._go(self._call)
        if self._begins_with_open():
            return True
        if self._may_become(self._opens):
            return False
        self._release()
        self._state = self._text
        return True

    def _text(self) -> bool:
        match = self._open.search(self._buf) if self._open else None
        if match is not None:
            self._give_text(self._buf[: match.start()])
            self._buf = self._buf[match.start() :]
            return self._begins_with_open()
        keep = 0 if self._is_final else _overlap(self._buf, self._opens)
        cut = len(self._buf) - keep
        self._give_text(self._buf[:cut])
        self._buf = self._buf[cut:]
        return False

    def _call(self) -> bool:
        raise NotImplementedError

    # Helpers of states.

    def _is_bare_call(self) -> bool:
        return False

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _begins_with_open(self) -> bool:
        match = self._open.match(self._buf) if self._open else None
        if match is None:
            return False
        self._take(match.end())
        self._state = self._call
        return True

    def _may_become(self, words: Collection[str]) -> bool:
        """Return whether more text could turn the buffer into one of `words`."""
        return not self._is_final and any(word.startswith(self._buf) for word in words)

    def _take(self, count: int) -> None:
        self._raw.append(self._buf[:count])
        self._buf = self._buf[count:]

    def _take_space(self) -> None:
        match = _SPACES.match(self._buf)
        if match is not None and match.end():
            self._take(match.end())

    def _give_text(self, text: str) -> None:
        if text:
            self._has_text = True
            self._out.append(("text", text))

    def _release(self) -> None:
        """What was taken is no call after all."""
        self._give_text("".join(self._raw))
        self._raw = []

    def _fail(self) -> bool:
        self._release()
        self._state = self._text
        return True

    def _start(self, name: str) -> None:
        self._has_calls = True
        self._raw = []
        self._out.append(("start", name))


class JsonToolParser(MarkerParser):
    """Calls as JSON objects, alone or in an array, with or without markers: see `JsonFormat`."""

    def __init__(self, form: JsonFormat, names: Collection[str]) -> None:
        super().__init__(form.opens)
        self._form = form
        self._names = names
        self._in_array = self._is_bare = self._is_closed = False
        self._scanner = CallScanner()
        self._span = ValueSpan()

    def _is_bare_call(self) -> bool:
        self._is_bare = self._form.is_bare and self._buf[0] in "{["
        return self._is_bare

    def _call(self) -> bool:
        """The beginning of a call: an array, an object, or a name in front of an object."""
        self._take_space()
        if not self._buf:
            return False
        if self._begins_with_open():
            return True
        if self._may_become(self._opens):
            return False
        if self._buf[0] == "[" and not self._in_array:
            self._in_array = True
            self._take(1)
            return True
        if self._form.name_of is not None and not self._in_array:
            return self._go(self._header)
        if self._buf[0] != "{":
            return self._fail()
        self._is_closed = False
        self._scanner = CallScanner(self._names if self._is_bare else None)
        return self._go(self._object)

    def _fail(self) -> bool:
        self._in_array = self._is_bare = False
        return super()._fail()

    def _header(self) -> bool:
        """What stands before the arguments: the name between marks of the family."""
        assert self._form.name_of is not None
        end = self._buf.find("{")
        if end < 0:
            return self._fail() if self._is_final or len(self._buf) > _HEADER_CHARS else False
        name = self._form.name_of(self._buf[:end]) if end <= _HEADER_CHARS else None
        if not name or not _NAME.fullmatch(name):
            return self._fail()
        self._buf = self._buf[end:]
        self._is_closed = False
        self._start(name)
        self._span = ValueSpan()
        return self._go(self._arguments)

    def _arguments(self) -> bool:
        end = self._span.feed(self._buf, 0)
        self._out.append(("args", self._buf[:end]))
        self._buf = self._buf[end:]
        return self._span.status != "more" and self._go(self._end)

    def _object(self) -> bool:
        had_started = self._scanner.has_started
        end, pieces = self._scanner.feed(self._buf)
        if self._scanner.has_started and not had_started:
            self._has_calls = True
            self._raw = []
        self._out += pieces
        if self._scanner.has_started:
            self._buf = self._buf[end:]
        else:
            self._take(end)
        if self._scanner.status == "more":
            return False
        return self._go(self._end) if self._scanner.has_started else self._fail()

    def _end(self) -> bool:
        """What follows a call: a closing marker, a separator and the next call, or text."""
        self._take_space()
        if not self._buf:
            return False
        for close in self._form.closes:
            if self._buf.startswith(close):
                self._buf = self._buf[len(close) :]
                self._raw = []
                self._in_array = False
                self._is_closed = True
                return True
        if self._may_become((*self._form.closes, *self._opens)):
            return False
        char = self._buf[0]
        if char == "]" and self._in_array:
            self._in_array = False
            self._raw = []
            self._buf = self._buf[1:]
            return True
        if char in _SEPARATORS and (self._in_array or self._form.separators):
            self._take(1)
            return self._go(self._next)
        if char == "{" and self._form.name_of is None and not self._is_closed:
            return self._go(self._call)
        self._in_array = self._is_bare = False
        return self._go(self._lead)

    def _next(self) -> bool:
        """After a separator: a call, or the separator was text."""
        self._take_space()
        if not self._buf:
            return False
        return self._go(self._call) if self._buf[0] == "{" else self._fail()


def _overlap(text: str, words: Collection[str]) -> int:
    """Return how many characters at the end of `text` could begin one of `words`."""
    longest = min(len(text), max((len(word) for word in words), default=1) - 1)
    for size in range(longest, 0, -1):
        tail = text[-size:]
        if any(word.startswith(tail) for word in words):
            return size
    return 0
