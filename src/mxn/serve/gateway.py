"""The outermost layer: who asks, how long it may take, headers of the answer, the last catch.

One plain ASGI middleware on the way of every request, so it does little. It makes the request's
context, finds the key in the ledger or among fixed keys, and adds headers when the answer begins.
Knows no model. Neither keys nor bodies are ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mxn.errors import ForbiddenError, OverloadedError
from mxn.ledger.types import Ledger
from mxn.ledger.types import Scope as KeyScope
from mxn.serve.context import RequestContext, enter
from mxn.serve.dialects import response_on
from mxn.serve.openai.errors import ApiError, from_exception, request_id, unauthorized
from mxn.serve.routing.headers import route_headers
from mxn.serve.traffic import Traffic

# Probes and scrapers have no key, and what they see holds nothing of a user.
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version", "/openapi.json"})
# With a key of the scope `admin` they say more: what each organization spent, where replicas are.
_SHOWS_MORE = frozenset({"/health", "/metrics"})
CONTEXT = "mxn.context"  # in the scope: a context that was made before, by a batch

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_LIMIT_NAMES = {"requests": "requests", "input_tokens": "tokens", "output_tokens": "output-tokens"}

OnBegin = Callable[[RequestContext, Scope], None]
"""Called when a request has come: (context, scope)."""

OnEnd = Callable[[RequestContext, Scope, int], None]
"""Called when a request is over: (context, scope, HTTP status)."""


class Gateway:
    """Wraps an app; every answer carries `x-request-id`, the client's own where it sent one."""

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Sequence[str] = (),
        *,
        ledger: Callable[[], Ledger | None] = lambda: None,
        request_timeout_s: float | None = None,
        max_requests: int | None = None,
        traffic: Traffic | None = None,
        on_begin: OnBegin | None = None,
        on_end: Sequence[OnEnd] = (),
    ) -> None:
        """`ledger` is asked for each request, since it is opened when the server starts."""
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._ledger = ledger
        self._timeout_s = request_timeout_s
        self._max_requests = max_requests
        self._num_running = 0
        self._traffic = traffic
        self._on_begin = on_begin
        self._on_end = tuple(on_end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, authorization, api_key, timeout = _read(scope["headers"])
        context: RequestContext | None = scope.get(CONTEXT)
        is_inner = context is not None
        if context is None:
            context = RequestContext(request_id=_request_id(given), endpoint=scope["path"])
        context.ledger = self._ledger()
        context.traffic = self._traffic
        enter(context)
        request_id.set(context.request_id)
        if self._on_begin is not None:
            self._on_begin(context, scope)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_headers(context)]
            await send(message)

        self._num_running += 1
        try:
            self._admit(scope)
            if not is_inner:
                context.deadline_s = self._deadline_s(timeout)
                await self._authenticate(context, scope, authorization, api_key)
            await self._app(scope, receive, send_with_headers)
        except Exception as exc:  # the last catch: a client always gets the error shape
            error = from_exception(exc)
            if not status:
                await response_on(scope["path"], error)(scope, receive, send_with_headers)
        finally:
            self._num_running -= 1
            for on_end in self._on_end:
                on_end(context, scope, status or 499)

    def _admit(self, scope: Scope) -> None:
        limit = self._max_requests
        if limit is not None and self._num_running > limit and scope["path"] not in OPEN_PATHS:
            raise OverloadedError(f"{limit} requests are under way, which is this server's limit")

    def _deadline_s(self, header: bytes) -> float | None:
        """Return when a request must end: the client's own limit, up to the server's."""
        limit_s = self._timeout_s
        if header:
            try:
                asked_s = float(header)
            except ValueError:
                asked_s = -1.0
            if not 0 < asked_s < 1e9:
                raise ApiError(f"x-request-timeout is seconds above 0, got {header[:40]!r}.")
            limit_s = asked_s if limit_s is None else min(asked_s, limit_s)
        return None if limit_s is None else time.monotonic() + limit_s

    async def _authenticate(
        self, context: RequestContext, scope: Scope, authorization: bytes, api_key: bytes
    ) -> None:
        """Find out who asks. Raises: AuthError, ForbiddenError, ApiError 401."""
        if scope["method"] == "OPTIONS":
            return
        kind, _, key = authorization.partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else b""
        key = key or api_key.strip()
        if scope["path"] in OPEN_PATHS and not (key and scope["path"] in _SHOWS_MORE):
            return
        if self._digests and self._is_fixed(key):
            return
        ledger = context.ledger
        if ledger is None:
            if self._digests:
                raise _unknown(key)
            return
        if not key:
            raise _unknown(key)
        context.principal = await ledger.authenticate(key.decode("latin-1"))
        if scope["path"] in OPEN_PATHS:
            return
        needed = _scope_of(scope["path"])
        if needed not in context.principal.scopes:
            raise ForbiddenError(
                f"this key has no scope {needed!r}, which {scope['path']} needs",
                hint=f"make one with: mxn keys create --scope {needed}",
            )

    def _is_fixed(self, key: bytes) -> bool:
        given = _digest(key)
        # No early exit: the time must not tell which of the keys came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _read(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes, bytes, bytes]:
    """Return x-request-id, authorization, x-api-key and x-request-timeout in one pass."""
    given = authorization = api_key = timeout = b""
    for name, value in headers:
        if name == b"authorization":
            authorization = value
        elif name == b"x-request-id":
            given = value
        elif name == b"x-api-key":
            api_key = value
        elif name == b"x-request-timeout":
            timeout = value
    return given, authorization, api_key, timeout


def _scope_of(path: str) -> KeyScope:
    """Return the scope that a path needs."""
    if path.startswith("/replica/"):
        return "replica"
    if path.startswith(("/v1/batches", "/v1/files")):
        return "batch"
    if path.endswith(("/load_lora_adapter", "/unload_lora_adapter")):
        return "admin"
    return "inference"


def _headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    """Return what every answer says of its request; called when the answer begins."""
    own_s = time.perf_counter() - context.arrived_s - context.upstream_s
    found = [
        (b"x-request-id", context.request_id.encode("latin-1")),
        (b"x-mxn-overhead-ms", b"%.3f" % (1000 * max(0.0, own_s))),
    ]
    for name, value in route_headers(context).items():
        found.append((name.encode(), value.encode("latin-1")))
    for limit in context.limits:
        kind = _LIMIT_NAMES[limit.kind].encode()
        found.append((b"x-ratelimit-limit-" + kind, b"%d" % limit.limit))
        found.append((b"x-ratelimit-remaining-" + kind, b"%d" % max(0, limit.remaining)))
        found.append((b"x-ratelimit-reset-" + kind, b"%.3fs" % limit.reset_s))
    for name, value in context.headers.items():
        found.append((name.encode(), value.encode("latin-1")))
    return found


def _unknown(key: bytes) -> ApiError:
    what = "Incorrect API key provided." if key else "You didn't provide an API key."
    return unauthorized(f"{what} Send it as 'Authorization: Bearer KEY'.", is_wrong=bool(key))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(given: bytes) -> str:
    """Return the client's id if it is short and printable, else a new one."""
    if given and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"req-{os.urandom(16).hex()}"
