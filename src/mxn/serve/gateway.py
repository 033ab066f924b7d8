"""The outermost layer: request ids, API keys and the last catch, as one plain ASGI middleware.

Knows no model. Keys are kept as SHA-256 digests and compared in constant time; neither keys nor
bodies are ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mxn.serve.openai.errors import ApiError, from_exception, request_id

# Probes and scrapers have no key, and what they see holds nothing of a user.
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version", "/openapi.json"})

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class Gateway:
    """Wraps an app; every answer carries `x-request-id`, the client's own where it sent one."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        own_id = _request_id(headers)
        request_id.set(own_id.decode("ascii"))
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message["headers"], (b"x-request-id", own_id)]
            await send(message)

        try:
            self._authenticate(scope, headers)
            await self._app(scope, receive, send_with_id)
        except Exception as exc:  # the last catch: a client always gets the error shape
            error = from_exception(exc)
            if not has_started:
                await error.response()(scope, receive, send_with_id)

    def _authenticate(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not self._digests or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # No early exit: the time must not tell which of the keys came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if kind.lower() == b"bearer" and any(matches):
            return
        what = "Incorrect API key provided." if key else "You didn't provide an API key."
        raise ApiError(
            f"{what} Send it as 'Authorization: Bearer KEY'.",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    """Return the client's id if it is short and printable, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()
