"""The OpenAPI document, made from the structs that check requests and build answers.

One `Operation` is a route and its entry in the document, so neither exists without the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import mxn
from mxn.serve.anthropic.errors import AnthropicError
from mxn.serve.flat import FlatError
from mxn.serve.http import Handler
from mxn.serve.openai.types import ErrorBody

_REF = "#/components/schemas/{name}"
_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path; `chunk` is the type of a streamed event where there is one."""

    method: str
    path: str
    handler: Handler
    summary: str
    request: type | None = None
    response: type | None = None
    chunk: type | None = None
    media_type: str = "application/json"


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of `operations`."""
    types: list[type] = [ErrorBody, FlatError, AnthropicError]
    for op in operations:
        types += [item for item in (op.request, op.response, op.chunk) if item is not None]
    unique = list(dict.fromkeys(types))
    references, components = msgspec.json.schema_components(unique, ref_template=_REF)
    schemas = dict(zip(unique, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        path = _PATH_PARAMETER.sub(r"{\1}", op.path)
        paths.setdefault(path, {})[op.method.lower()] = _entry(op, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mxn", "version": mxn.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}, {}],
    }


def _error_type(path: str) -> type | None:
    """Return the shape of errors on a path, as `dialects` writes them; None: its own."""
    if path in ("/health", "/ping"):
        return None  # a 503 says in the words of the 200 what is not ready
    if path.startswith("/maas/"):
        return FlatError
    return AnthropicError if path.startswith("/v1/messages") else ErrorBody


def _entry(op: Operation, schemas: dict[type, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {
        op.media_type: {"schema": schemas[op.response] if op.response else {}}
    }
    if op.chunk is not None:
        content["text/event-stream"] = {"schema": schemas[op.chunk]}
    said = _error_type(op.path)
    error = {"application/json": {"schema": {} if said is None else schemas[said]}}
    entry: dict[str, Any] = {
        "summary": op.summary,
        "operationId": re.sub(r"\W+", "_", f"{op.method.lower()}{op.path}").strip("_"),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "An error.", "content": error},
        },
    }
    if op.request is not None:
        body = {"application/json": {"schema": schemas[op.request]}}
        entry["requestBody"] = {"required": True, "content": body}
    names = _PATH_PARAMETER.findall(op.path)
    if names:
        entry["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return entry
