"""Pieces of grammars in llguidance's Lark dialect, and the check of what users send.

A mark such as `<tool_call>` may be a token of its own, which a plain string does not match, so a
mark is written as the token or its letters. Knows no tools and no formats.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from mxn.engine.protocol import MAX_GRAMMAR_CHARS, Grammar

TokenOf = Callable[[str], int | None]
"""The id of a token that is spelled like this, or None."""

# One space, or a new line with its indentation. With more freedom a weak model fills its answer
# with white space until the limit.
_JSON_RULES = {"whitespace_pattern": r"( ?|\n[ \t]{0,16})", "coerce_one_of": True}

_MAX_PATTERNS = 8  # of a schema that is read here
_MAX_FAULTS = 512  # grammars whose check is remembered; agents send the same tools again
_MAX_FAULT_CHARS = 400
_faults: OrderedDict[bytes, str | None] = OrderedDict()


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def mark(text: str, token_of: TokenOf) -> str:
    """Return an expression for `text` as one token or as letters."""
    token_id = token_of(text)
    return literal(text) if token_id is None else f"(<[{token_id}]> | {literal(text)})"


def regex(pattern: str) -> str:
    """Return `pattern` as a terminal: slashes end one, and it must stay on its line."""
    escaped = re.sub(r"\\.|/|\n|\r", lambda found: _in_slashes(found[0]), pattern, flags=re.DOTALL)
    return f"/{escaped}/"


def _in_slashes(found: str) -> str:
    return {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n"}.get(found, found)


def until(name: str, text: str, token_of: TokenOf) -> list[str]:
    """Return rules by which `name` is anything up to and with the first `text`."""
    pattern = regex(f"(?s:.*){re.escape(text)}")
    token_id = token_of(text)
    rules = [f"{name}_letters[lazy]: {pattern}"]
    if token_id is None:
        return [f"{name}: {name}_letters", *rules]
    rules.append(f"{name.upper()}_TEXT: {without([text])}")
    return [f"{name}: {name}_letters | {name.upper()}_TEXT <[{token_id}]>", *rules]


def without(words: Sequence[str]) -> str:
    """Return a terminal for any text that holds none of `words`."""
    if not words:
        return "/(?s:.*)/"
    inner = "|".join(re.escape(word) for word in words)
    return f"/(?s:.*)/ & ~{regex(f'(?s:.*)({inner})(?s:.*)')}"


def json_of(schema: dict[str, Any]) -> str:
    """Return the JSON text of a schema with the rules for white space, unless it has its own."""
    return json.dumps({"x-guidance": _JSON_RULES, **schema}, ensure_ascii=False)


def expression(grammar: Grammar) -> str:
    """Return a grammar as an expression, to stand inside of another one."""
    if grammar.kind == "json_schema":
        return f"%json {grammar.source}"
    if grammar.kind == "regex":
        return regex(grammar.source)
    if grammar.kind == "choice":
        return " | ".join(literal(choice) for choice in grammar.source.split("\n"))
    return f"%lark {{\n{grammar.source}\n}}"


def _may_not_end(grammar: Grammar) -> bool:
    """Whether the library may need forever to read the schemas of a grammar.

    It does where patterns meet on one text: some twenty under `allOf` are minutes.
    """
    source = grammar.source
    if grammar.kind != "json_schema" and "%json" not in source:
        return False
    if "\\u" in source or '"allOf"' in source or '"patternProperties"' in source:
        return True
    return source.count('"pattern"') > _MAX_PATTERNS


def fault(grammar: Grammar) -> str | None:
    """Return what is wrong with a grammar, or None.

    None also where to find out could take too long here: the engine has a process for that, and
    refuses the request.
    """
    if len(grammar.source) > MAX_GRAMMAR_CHARS:
        return f"it has {len(grammar.source)} characters, the limit is {MAX_GRAMMAR_CHARS}"
    if grammar.kind == "choice" or _may_not_end(grammar):
        return None
    # Kept by digest: sources may be large.
    key = blake2b(f"{grammar.kind}\n{grammar.source}".encode(), digest_size=16).digest()
    if key not in _faults:
        _faults[key] = _fault(grammar)
        if len(_faults) > _MAX_FAULTS:
            _faults.popitem(last=False)
    _faults.move_to_end(key)
    return _faults[key]


def _fault(grammar: Grammar) -> str | None:
    from llguidance import LLMatcher  # a native library; only servers that constrain load it

    make = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    try:
        found = LLMatcher.validate_grammar(make[grammar.kind](grammar.source), None)
    except ValueError as exc:
        found = str(exc)
    # What follows such a mark is the library's own state.
    return found.partition("\n<")[0].strip()[:_MAX_FAULT_CHARS] or None
