"""Foreign servers that answer for one model: which of them to ask, and what their answers mean.

A server that fails is left alone for a while and tried again; the least busy of the others is
asked. Knows HTTP answers and their errors; knows no protocol of ours.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from mxn.errors import ConfigError, EngineDiedError, OverloadedError
from mxn.serve.openai.errors import ApiError
from mxn.serve.replicas.http_client import Answer, ConnectionLost, HttpClient, HttpLimits
from mxn.serve.replicas.sse import clipped

Kind = Literal["openai", "vllm", "sglang", "llama.cpp", "mindie", "mxn"]
Continue = Literal["field", "prefill", "no"]

KINDS: tuple[Kind, ...] = ("openai", "vllm", "sglang", "llama.cpp", "mindie", "mxn")
# How a server goes on with a half-finished answer: with the field `continue_final_message`, or
# because it continues whatever the assistant said last.
_CONTINUES: dict[Kind, Continue] = {
    "vllm": "field", "sglang": "field", "mxn": "field", "llama.cpp": "prefill",
}  # fmt: skip
_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # for which a server that failed n times is left alone
_MAX_REFUSAL_CHARS = 4000  # of a server's words on the caller's own mistake, told to the caller
DEFAULT_MAX_OUTPUT = 4096  # tokens of an answer that a budget pays for, where the caller says none
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """One server. `url` ends before ``/v1``; `model` is its own name for the model."""

    url: str
    model: str
    name: str = ""
    kind: Kind = "openai"
    key: str | None = None
    chip: str = ""
    continues: Continue | None = None  # None: by kind
    limits: HttpLimits | None = None
    max_output: int | None = None  # tokens; None: `DEFAULT_MAX_OUTPUT`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind of server {self.kind!r}; one of {', '.join(KINDS)}")


class Upstream:
    """One server with its connections and what is known of its health."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self.url = config.url.rstrip("/").removesuffix("/v1")
        self.name = config.name or self.url.partition("://")[2]
        self.continues: Continue = config.continues or _CONTINUES.get(config.kind, "no")
        key = [(b"authorization", b"Bearer " + config.key.encode())] if config.key else []
        self.http = HttpClient(self.url, headers=key, limits=config.limits)
        self.model_json = msgspec.Raw(msgspec.json.encode(config.model))
        self.num_running = 0
        self.num_failures = 0
        self.open_at_s = 0.0  # on time.monotonic; before it, no request goes there by choice

    @property
    def is_healthy(self) -> bool:
        return time.monotonic() >= self.open_at_s

    def succeeded(self) -> None:
        self.num_failures = 0
        self.open_at_s = 0.0

    def failed(self, retry_after_s: float | None = None) -> None:
        pause_s = _PAUSES_S[min(self.num_failures, len(_PAUSES_S) - 1)]
        self.num_failures += 1
        self.open_at_s = time.monotonic() + (pause_s if retry_after_s is None else retry_after_s)


class UpstreamSet:
    """The servers of one model."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        if not upstreams:
            raise ConfigError("a model needs at least one server")
        self.all = tuple(upstreams)

    @property
    def max_output(self) -> int:
        """Tokens of an answer whose caller sets no limit: what suits every server."""
        given = [item.config.max_output for item in self.all if item.config.max_output is not None]
        return min(given, default=DEFAULT_MAX_OUTPUT)

    @property
    def is_healthy(self) -> bool:
        return any(item.is_healthy for item in self.all)

    def choose(self, tried: Sequence[Upstream] = ()) -> Upstream | None:
        """Return the least busy healthy server that was not tried; else the one due soonest."""
        if len(self.all) == 1:
            return None if tried else self.all[0]
        left = [item for item in self.all if item not in tried]
        now_s = time.monotonic()
        healthy = [item for item in left if item.open_at_s <= now_s]
        if healthy:
            return min(healthy, key=lambda item: item.num_running)
        return min(left, key=lambda item: item.open_at_s, default=None)

    async def close(self) -> None:
        for item in self.all:
            await item.http.close()


def is_retried(status: int) -> bool:
    """Whether another server may do better with the same request."""
    return status in _RETRIED


def retry_after_s(answer: Answer) -> float | None:
    value = answer.header(b"retry-after")
    return min(float(value), 60.0) if value is not None and value.isdigit() else None


def error_of(upstream: Upstream, answer: Answer, body: bytes) -> Exception:
    """Return what a caller is told of a refusal: the server's own words for the caller's mistakes.

    A wrong key of ours, or a model the server does not have, is not the caller's mistake.
    """
    status = answer.status
    message, fields = _words(body)
    if status == 429 or status == 503:
        wait_s = retry_after_s(answer)
        return OverloadedError(
            f"the server of this model is busy: {clipped(message)}", retry_after_s=wait_s or 1.0
        )
    if status >= 500 or status in (401, 403, 407):
        what = "refused our key" if status in (401, 403) else f"failed ({status})"
        told = f"the server {upstream.name} {what}: {clipped(message)}"
        return EngineDiedError(told, retry_after_s=2.0)
    return ApiError(
        message[:_MAX_REFUSAL_CHARS],
        status=status,
        type=_text(fields.get("type")) or "invalid_request_error",
        param=_text(fields.get("param")),
        code=_text(fields.get("code")),
    )


def reported_in(upstream: Upstream, fields: Mapping[str, msgspec.Raw]) -> ApiError | None:
    """Return the failure that an answer with status 200 reports instead of an answer."""
    error = fields.get("error")
    if error is None or bytes(error) in (b"null", b'""', b"false", b"{}"):
        return None
    message, _ = _words(bytes(error))
    return bad_answer(f"The server {upstream.name} reported: {clipped(message)}")


def bad_answer(message: str) -> ApiError:
    return ApiError(message, status=502, type="server_error", code="bad_upstream")


def _words(body: bytes) -> tuple[str, dict[str, Any]]:
    """Return the message and fields of an error body in one of the shapes servers have."""
    fields: dict[str, Any] = {}
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        value = msgspec.json.decode(body)
        if isinstance(value, dict):
            error = value.get("error", value)
            fields = error if isinstance(error, dict) else {"message": error}
    message = fields.get("message") or fields.get("detail") or body[:300].decode(errors="replace")
    return str(message), fields


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def lost(upstream: Upstream, exc: ConnectionLost) -> EngineDiedError:
    return EngineDiedError(f"the server {upstream.name} was lost: {exc.message}", retry_after_s=1.0)
