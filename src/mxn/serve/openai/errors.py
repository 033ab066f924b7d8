"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, always all four.

Every failure of a request becomes an `ApiError` here, and only here. Start at `from_exception`.
"""

from __future__ import annotations

import logging
import math
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mxn.errors import (
    AuthError,
    CapacityError,
    DeadlineError,
    EngineDiedError,
    ForbiddenError,
    MxnError,
    NotFoundError,
    OverloadedError,
    QuotaError,
    RateLimitError,
    UserError,
)

log = logging.getLogger("mxn.serve")

request_id: ContextVar[str] = ContextVar("request_id", default="?")
"""The `x-request-id` of the request that the current task works for."""

RETRY_AFTER_S = 2  # an engine restarts or finishes loading in seconds, not minutes


class ApiError(Exception):
    """A request that fails, with everything its answer says."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        extra: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.extra = extra or {}
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, **self.extra}}

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            media_type="application/json",
            headers=self.headers,
        )


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer any more."""


_SHOWN_NAME_CHARS = 200


def model_not_found(name: str, known: list[str]) -> ApiError:
    served = ", ".join(repr(item) for item in known) or "none"
    shown = name if len(name) <= _SHOWN_NAME_CHARS else f"{name[:_SHOWN_NAME_CHARS]}…"
    return ApiError(
        f"The model {shown!r} does not exist. Served models: {served}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def context_exceeded(prompt_tokens: int, max_tokens: int | None, limit: int) -> ApiError:
    """The prompt, or the prompt plus the tokens asked for, does not fit the context."""
    if max_tokens is None or prompt_tokens >= limit:
        asked = f"{prompt_tokens} prompt tokens"
    else:
        total = prompt_tokens + max_tokens
        asked = f"{total} tokens ({prompt_tokens} prompt tokens and {max_tokens} to generate)"
    return ApiError(
        f"This model's context is {limit} tokens; the request needs {asked}. "
        "Shorten the prompt or lower max_tokens.",
        param="messages" if max_tokens is None else "max_tokens",
        code="context_length_exceeded",
        extra={"n_prompt_tokens": prompt_tokens, "n_ctx": limit},
    )


def not_supported(param: str, what: str) -> ApiError:
    return ApiError(f"{what} is not supported yet.", param=param, code="unsupported_parameter")


def unavailable(
    message: str,
    *,
    type: str = "overloaded_error",
    code: str,
    retry_after_s: float = RETRY_AFTER_S,
) -> ApiError:
    """The same request may succeed a little later."""
    headers = {"retry-after": str(math.ceil(retry_after_s))}
    return ApiError(message, status=503, type=type, code=code, headers=headers)


def engine_died(exc: EngineDiedError) -> ApiError:
    """The replica ended; where it does not come back by itself, a client should not retry."""
    error = unavailable(
        _one_line(exc),
        type="server_error",
        code="engine_unavailable",
        retry_after_s=exc.retry_after_s or RETRY_AFTER_S,
    )
    if exc.retry_after_s is None:
        error.headers["x-should-retry"] = "false"
    return error


def from_exception(exc: BaseException) -> ApiError:
    """Return what a client is told about `exc`; unknown ones are logged and told nothing."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, HTTPException):
        return _from_http(exc)
    if isinstance(exc, MxnError) and (refusal := _refusal(exc)) is not None:
        return refusal
    if isinstance(exc, CapacityError) and exc.code == "overloaded":
        return unavailable(_one_line(exc), code="overloaded")
    if isinstance(exc, UserError):
        status = 404 if isinstance(exc, NotFoundError) else 400
        return ApiError(_one_line(exc), status=status, code=exc.code)
    if isinstance(exc, EngineDiedError):
        return engine_died(exc)
    log.error("request %s failed", request_id.get(), exc_info=exc)
    return ApiError(
        "The server had an internal error; its log has the details under the x-request-id.",
        status=500,
        type="server_error",
        code="internal_error",
    )


def unauthorized(message: str, *, is_wrong: bool) -> ApiError:
    """No key was given, or (`is_wrong`) one that does not hold."""
    challenge = 'Bearer error="invalid_token"' if is_wrong else "Bearer"
    return ApiError(
        message, status=401, code="invalid_api_key", headers={"www-authenticate": challenge}
    )


def _refusal(exc: MxnError) -> ApiError | None:
    """Return the answer for what a tenant, not the request itself, is refused for."""
    text = _one_line(exc)
    if isinstance(exc, AuthError):
        return unauthorized(text, is_wrong=True)
    if isinstance(exc, ForbiddenError):
        return ApiError(text, status=403, type="permission_error", code=exc.code)
    if isinstance(exc, QuotaError):
        # Where it is spent a retry cannot help, and official clients would try again.
        headers = {"x-should-retry": "false"}
        if exc.retry_after_s is not None:
            headers = _retry_headers(exc.retry_after_s)
        return ApiError(text, status=429, type="insufficient_quota", code=exc.code, headers=headers)
    if isinstance(exc, RateLimitError):
        headers = _retry_headers(exc.retry_after_s)
        return ApiError(text, status=429, type="rate_limit_error", code=exc.code, headers=headers)
    if isinstance(exc, OverloadedError):
        headers = _retry_headers(exc.retry_after_s)
        return ApiError(text, status=503, type="overloaded_error", code=exc.code, headers=headers)
    if isinstance(exc, DeadlineError):
        return ApiError(text, status=408, type="timeout", code=exc.code)
    return None


def _retry_headers(after_s: float) -> dict[str, str]:
    """Whole seconds for everybody, milliseconds for clients that understand them."""
    return {
        "retry-after": str(max(1, math.ceil(after_s))),
        "retry-after-ms": str(max(1, math.ceil(1000 * after_s))),
    }


def _from_http(exc: HTTPException) -> ApiError:
    if exc.status_code == 404:
        message, code = "Unknown URL. See /openapi.json for the routes.", "unknown_url"
    elif exc.status_code == 405:
        message, code = "This URL does not take this method.", "method_not_allowed"
    else:
        message, code = str(exc.detail), None
    headers = dict(exc.headers or {})
    return ApiError(message, status=exc.status_code, code=code, headers=headers)


def _one_line(exc: MxnError) -> str:
    return f"{exc.message} ({exc.hint})" if exc.hint else exc.message
