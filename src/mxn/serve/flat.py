"""Errors under /maas: `{"code": int, "msg": str}` with the HTTP status of the same error on /v1.

60000: no token; 10009: a wrong one. Every other error is in the range 61000 to 61999: a number of
its own where clients may want to tell it apart, else 61000 + HTTP status. Knows no routes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mxn.serve.openai.errors import ApiError


class FlatError(msgspec.Struct, frozen=True):
    """The body of an error."""

    code: int
    msg: str


NO_TOKEN = 60000
BAD_KEY = 10009
BASE = 61000  # + HTTP status, for what has no row

CODES = {
    "context_length_exceeded": 61001,
    "invalid_json": 61002,
    "unsupported_parameter": 61003,
    "model_kind": 61004,
    "model_not_found": 61010,
    "chip_not_found": 61011,
    "model_not_on_chip": 61012,
    "unknown_url": 61013,
    "permission_denied": 61020,
    "insufficient_quota": 61030,
    "rate_limit_exceeded": 61031,
    "request_timeout": 61040,
    "overloaded": 61050,
    "model_loading": 61051,
    "model_failed": 61052,
    "engine_unavailable": 61053,
}


def code_of(error: ApiError) -> int:
    """Return the number of an error."""
    if error.status == 401:
        # RFC 6750: a challenge says `invalid_token` where there was one, and nothing where not.
        challenge = error.headers.get("www-authenticate", "")
        return BAD_KEY if "invalid_token" in challenge else NO_TOKEN
    return CODES.get(error.code or "", BASE + error.status)


def body_of(error: ApiError) -> dict[str, Any]:
    """Return what a client of `/maas/…` is told."""
    return msgspec.structs.asdict(FlatError(code_of(error), error.message))
