"""Errors in Anthropic's shape: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from typing import Any

import msgspec

from mxn.serve.openai.errors import ApiError

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


def body_of(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """Return what a client of `/v1/messages` is told."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else _TYPES[400])
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


def event_of(error: ApiError, request_id: str | None = None) -> bytes:
    """Return the event that ends a stream which fails after it has begun."""
    return b"event: error\ndata: " + msgspec.json.encode(body_of(error, request_id)) + b"\n\n"
