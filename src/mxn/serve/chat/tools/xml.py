"""Calls whose arguments are elements: `<function=NAME>`, then one element for each argument.

An argument goes out when its element is complete, as JSON of the type that the tool's schema says.
Start at `XmlToolParser`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mxn.serve.chat.tools.formats import XmlFormat
from mxn.serve.chat.tools.parser import MarkerParser

_HEADER_CHARS = 512
_NAME = re.compile(r"[\w.:/-]+")


class XmlToolParser(MarkerParser):
    """Calls as `XmlFormat` says; `schemas` are the parameters of the tools, by name."""

    def __init__(self, form: XmlFormat, schemas: Mapping[str, dict[str, Any]]) -> None:
        # Some models leave the outer element away.
        super().__init__((*form.opens, form.head) if form.head else form.opens)
        self._form = form
        self._schemas = schemas
        self._name = ""
        self._num_arguments = 0
        self._searched = 0  # characters of the buffer without the end of the element

    def _begins_with_open(self) -> bool:
        if self._form.head and self._buf.startswith(self._form.head):
            self._state = self._call
            return True
        return super()._begins_with_open()

    def _call(self) -> bool:
        """The name of the function."""
        self._take_space()
        if not self._buf:
            return False
        form = self._form
        if not self._buf.startswith(form.head):
            return False if self._may_become((form.head,)) else self._fail()
        end = re.search(r"[>\n<]" if form.head else r"\n|<", self._buf[len(form.head) :])
        if end is None:
            too_long = len(self._buf) > _HEADER_CHARS
            return self._fail() if self._is_final or too_long else False
        cut = len(form.head) + end.start()
        name = self._buf[len(form.head) : cut].strip()
        if not _NAME.fullmatch(name):
            return self._fail()
        self._buf = self._buf[cut + (end[0] in form.head_end) :]
        self._name, self._num_arguments, self._searched = name, 0, 0
        self._start(name)
        self._out.append(("args", "{"))
        return self._go(self._argument)

    def _fail(self) -> bool:
        if self._buf.startswith(self._form.head):
            self._take(len(self._form.head))  # or it would be found again
        return super()._fail()

    def _argument(self) -> bool:
        """One argument, or the end of the call."""
        self._buf = self._buf.lstrip()
        form = self._form
        if not self._buf:
            return False
        if self._buf.startswith(form.key):
            return self._element()
        closes = tuple(word for word in (form.foot, *form.closes) if word)
        if self._may_become((form.key, *closes)) and not self._buf.startswith(closes):
            return False
        self._out.append(("args", "}"))
        return self._go(self._end)

    def _element(self) -> bool:
        form = self._form
        at = self._buf.find(form.value_end, self._searched)
        if at < 0:
            self._searched = max(0, len(self._buf) - len(form.value_end))
            return False
        inner = self._buf[len(form.key) : at]
        self._buf = self._buf[at + len(form.value_end) :]
        self._searched = 0
        # The mark between key and value may have other white space than the family's template.
        mark = r"\s*".join(re.escape(part) for part in form.value.split("\n"))
        key, _, value = _partition(mark, inner)
        text = value.removeprefix("\n").removesuffix("\n")
        comma = ", " if self._num_arguments else ""
        self._num_arguments += 1
        piece = f"{comma}{json.dumps(key.strip(), ensure_ascii=False)}: {self._value(key, text)}"
        self._out.append(("args", piece))
        return True

    def _value(self, key: str, text: str) -> str:
        """Return the JSON of a value: a string where the schema says so, or where it is no JSON."""
        properties = self._schemas.get(self._name, {}).get("properties")
        schema = properties.get(key.strip()) if isinstance(properties, dict) else None
        if is_text(schema):
            return json.dumps(text, ensure_ascii=False)
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        return text.strip()

    def _end(self) -> bool:
        self._take_space()
        if not self._buf:
            return False
        for close in (self._form.foot, *self._form.closes):
            if close and self._buf.startswith(close):
                self._buf = self._buf[len(close) :]
                self._raw = []
                return True
        words = (self._form.foot, *self._form.closes, *self._opens)
        return not self._may_become(words) and self._go(self._lead)


def _partition(mark: str, text: str) -> tuple[str, str, str]:
    match = re.search(mark, text)
    if match is None:
        return text, "", ""
    return text[: match.start()], match[0], text[match.end() :]


def is_text(schema: Any) -> bool:
    """Return whether a schema takes strings only, which such formats write without quotes."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return schema["type"] == "string"
    values = schema.get("enum")
    return isinstance(values, list) and all(isinstance(item, str) for item in values)
