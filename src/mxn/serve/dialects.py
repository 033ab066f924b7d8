"""How an error is said on a path: OpenAI's shape, Anthropic's, or the flat one of `/maas/…`.

The middleware and the endpoints ask here, so that a wrong key and a wrong field look alike to the
client of a protocol. A new dialect adds its row to `_BY_PREFIX`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.responses import Response

from mxn.serve.anthropic.errors import body_of as anthropic_body
from mxn.serve.flat import body_of as flat_body
from mxn.serve.openai.errors import ApiError

Dialect = Callable[[ApiError], dict[str, Any]]

_BY_PREFIX: tuple[tuple[str, Dialect], ...] = (
    ("/v1/messages", anthropic_body),
    ("/maas/", flat_body),
)


def body_on(path: str, error: ApiError) -> dict[str, Any]:
    """Return the body of `error` for a client of `path`."""
    for prefix, dialect in _BY_PREFIX:
        if path.startswith(prefix):
            return dialect(error)
    return error.body()


def response_on(path: str, error: ApiError) -> Response:
    return Response(
        msgspec.json.encode(body_on(path, error)),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )
