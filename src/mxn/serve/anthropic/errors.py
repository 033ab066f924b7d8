"""Errors in Anthropic's shape: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from typing import Any

import msgspec

from mxn.serve.openai.errors import ApiError, request_id

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The body of an error."""

    error: AnthropicErrorDetail
    request_id: str


def body_of(error: ApiError) -> dict[str, Any]:
    """Return what a client of `/v1/messages` is told."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else _TYPES[400])
    body = AnthropicError(AnthropicErrorDetail(kind, error.message), request_id.get())
    return msgspec.to_builtins(body)


def event_of(error: ApiError) -> bytes:
    """Return the event that ends a stream which fails after it has begun."""
    return b"event: error\ndata: " + msgspec.json.encode(body_of(error)) + b"\n\n"
