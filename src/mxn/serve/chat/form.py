"""What the text of an answer must look like, in OpenAI's words and in vLLM's, as a grammar. Pure.

Start at `answer_form`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from mxn.engine.protocol import Grammar
from mxn.serve.chat import lark
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import ChatRequest, ResponseFormat

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def answer_form(body: ChatRequest) -> Grammar | None:
    """Return what the text of the answer must be, or None. Raises: ApiError with `param`."""
    found = [item for item in _forms(body) if item is not None]
    if len(found) > 1:
        names = ", ".join(param for param, _ in found)
        raise ApiError(f"Only one of {names} can say what the answer is.", param=found[1][0])
    if not found:
        return None
    param, grammar = found[0]
    if wrong := lark.fault(grammar):
        raise ApiError(f"{param} cannot be enforced: {wrong}", param=param)
    return grammar


def _forms(body: ChatRequest) -> list[tuple[str, Grammar] | None]:
    extras: list[tuple[str, Any, Any, Any, Any, Any]] = [
        ("guided_", body.guided_json, body.guided_regex, body.guided_choice,
         body.guided_grammar, None),
    ]  # fmt: skip
    inner = body.structured_outputs
    if inner is not None:
        extras.append(
            ("structured_outputs.", inner.json, inner.regex, inner.choice, inner.grammar,
             inner.json_object)
        )  # fmt: skip
    found: list[tuple[str, Grammar] | None] = [_response_format(body.response_format)]
    for prefix, schema, regex, choice, grammar, any_object in extras:
        if schema is not None:
            found.append((f"{prefix}json", _json(_schema_of(schema, f"{prefix}json"))))
        if regex is not None:
            found.append((f"{prefix}regex", Grammar(kind="regex", source=regex)))
        if choice is not None:
            found.append((f"{prefix}choice", _choice(choice, f"{prefix}choice")))
        if grammar is not None:
            found.append((f"{prefix}grammar", Grammar(kind="lark", source=grammar)))
        if any_object:
            found.append((f"{prefix}json_object", _json(_ANY_OBJECT)))
    return found


def _response_format(wanted: ResponseFormat | None) -> tuple[str, Grammar] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "response_format", _json(wanted.schema or _ANY_OBJECT)
    if wanted.type != "json_schema":
        raise ApiError(
            f"response_format.type is text, json_object or json_schema, got {wanted.type!r}.",
            param="response_format.type",
        )
    inner = wanted.json_schema
    if inner is None:
        param = "response_format.json_schema"
        raise ApiError(f"{param} is required with type json_schema.", param=param)
    return "response_format.json_schema.schema", _json(inner.schema or _ANY_OBJECT)


def _json(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", source=lark.json_of(schema))


def _schema_of(value: str | dict[str, Any], param: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ApiError(f"{param} is a JSON schema: {exc}", param=param) from None


def _choice(choices: list[str], param: str) -> Grammar:
    if not choices or not all(choices):
        raise ApiError(f"{param} has at least one text, none of them empty.", param=param)
    if any("\n" in choice for choice in choices):
        return Grammar(kind="lark", source=f"start: {' | '.join(map(json.dumps, choices))}")
    return Grammar(kind="choice", source="\n".join(choices))
