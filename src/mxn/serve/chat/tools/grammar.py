"""Rules that make an answer a call, in the words of a family, as lines of Lark.

Knows formats and schemas; knows no engine. Start at `call_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mxn.serve.chat.lark import TokenOf, json_of, literal, mark, until, without
from mxn.serve.chat.tools.formats import ToolFormat, XmlFormat
from mxn.serve.chat.tools.xml import is_text

_ROOT_KEYS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A function as a grammar needs it: `schema` is that of the object of its arguments."""

    name: str
    schema: dict[str, Any]


def call_rules(
    form: ToolFormat, functions: Sequence[Signature], token_of: TokenOf, *, is_single: bool
) -> list[str]:
    """Return rules for `calls`: one call, or several where `is_single` is false."""
    writer = _Writer(form, functions, token_of)
    return [f"calls: {writer.sequence(is_single=is_single)}", *writer.rules()]


def free_rules(
    form: ToolFormat, functions: Sequence[Signature], token_of: TokenOf, *, is_single: bool
) -> list[str]:
    """Return rules for `free`: text alone, or text and then calls that keep to their schemas."""
    writer = _Writer(form, functions, token_of)
    if not isinstance(form, XmlFormat) and form.is_bare:
        text = rf"/[^\s\{{\[](?s:.*)/ & {without(form.opens)}"
        calls = f"calls: {writer.sequence(is_single=is_single)}"
        return ["free: ANY_TEXT? | calls", f"ANY_TEXT: {text}", calls, *writer.rules()]
    return [
        f"free: ANY_TEXT | lead {writer.sequence(is_single=is_single, skips_mark=True)}",
        f"ANY_TEXT: {without(form.opens)}",
        *until("lead", writer.first_mark, token_of),
        *writer.rules(),
    ]


class _Writer:
    """Writes the calls of one format."""

    def __init__(self, form: ToolFormat, functions: Sequence[Signature], token_of: TokenOf) -> None:
        self._form = form
        self._functions = functions
        self._token_of = token_of
        self._marks = form.markers()
        self._split = re.compile(
            f"({'|'.join(map(re.escape, self._marks))})" if self._marks else "$^"
        )
        is_xml = isinstance(form, XmlFormat)
        self._begin = () if is_xml else form.begin
        self._between = (form.line,) if is_xml else form.between
        self._end = () if is_xml else form.end
        self._needs_first = False
        self.first_mark = (*self._begin, *self._before())[0]

    def sequence(self, *, is_single: bool, skips_mark: bool = False) -> str:
        """Return an expression for the calls; without the mark that begins the first of them."""
        self._needs_first = skips_mark and not self._begin
        begin = self._begin[1:] if skips_mark and self._begin else self._begin
        first = "first_call" if self._needs_first else "call"
        more = "" if is_single else f"({self._words(self._between)} call)*"
        return " ".join(f"{self._words(begin)} {first} {more} {self._words(self._end)}".split(" "))

    def rules(self) -> list[str]:
        """Return the rules of `call`, and of `first_call` where the sequence has one."""
        numbers = range(len(self._functions))
        lines = [f"call: {' | '.join(self._call(at, 0) for at in numbers)}"]
        if self._needs_first:
            lines.append(f"first_call: {' | '.join(self._call(at, 1) for at in numbers)}")
        for at in numbers:
            lines += self._arguments(at)
        return lines

    def _before(self) -> tuple[str, ...]:
        form = self._form
        if isinstance(form, XmlFormat):
            return (form.opens[0], (form.line if form.head else "") + form.head)
        return form.before

    def _call(self, at: int, num_skipped: int) -> str:
        form = self._form
        before = self._words(self._before()[num_skipped:])
        name = literal(self._functions[at].name)
        if isinstance(form, XmlFormat):
            tail = form.head_end if form.head_end.endswith("\n") else form.head_end + form.line
            after = (form.foot + form.line if form.foot else "", form.closes[0])
            return f"{before} {name} {self._words((tail,))} args_{at} {self._words(after)}"
        middle, after = self._words(form.middle), self._words(form.after)
        return f"{before} {name} {middle} args_{at} {after}"

    def _words(self, parts: Sequence[str]) -> str:
        """Return an expression for texts one after the other, with marks as their tokens."""
        pieces = (piece for part in parts for piece in self._split.split(part) if piece)
        return " ".join(
            mark(piece, self._token_of) if piece in self._marks else literal(piece)
            for piece in pieces
        )

    def _arguments(self, at: int) -> list[str]:
        schema = self._functions[at].schema
        if not isinstance(self._form, XmlFormat):
            return [f"args_{at}: %json {json_of(schema)}"]
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = set(schema.get("required") or ())
        elements = []
        lines = []
        for number, (key, value) in enumerate(properties.items()):
            rule = f"arg_{at}_{number}"
            elements.append(rule if key in required else f"{rule}?")
            lines += self._element(rule, key, value, schema)
        return [f"args_{at}: {' '.join(elements) or literal('')}", *lines]

    def _element(self, rule: str, key: str, value: Any, schema: dict[str, Any]) -> list[str]:
        form = self._form
        assert isinstance(form, XmlFormat)
        pad = form.line if form.head else ""
        head = self._words((form.key, key, form.value, pad))
        tail = f"{pad}{form.value_end}"
        if is_text(value) and "enum" not in value:
            lines = [f"{rule}: {head} {rule}_text {literal(form.line)}"]
            return [*lines, *until(f"{rule}_text", tail, self._token_of)]
        end = self._words((tail, form.line))
        if is_text(value):
            choices = " | ".join(literal(str(item)) for item in value["enum"])
            return [f"{rule}: {head} ({choices}) {end}"]
        roots = {name: schema[name] for name in _ROOT_KEYS if name in schema}
        inner = json_of({**value, **roots}) if isinstance(value, dict) else json_of(roots)
        return [f"{rule}: {head} %json {inner} {end}"]
