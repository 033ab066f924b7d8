"""The thin layer between ASGI and handlers: bodies in, answers out, disconnects noticed.

Knows HTTP and the error shape; knows no model. Handlers are `async (request) -> Response`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mxn.serve.dialects import response_on
from mxn.serve.openai.errors import ApiError, ClientGone, from_exception

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+)\]")
_SHOWN_CHARS = 60

# Decoding holds every other request up. A megabyte of text takes a millisecond, but a megabyte of
# nested empty lists 150: so their number is limited, not only the bytes.
_COUNTED_BYTES = 1 << 20
MAX_CONTAINERS: Final = 250_000  # objects and lists in one body
MAX_STRINGS: Final = 500_000
BODY_TIMEOUT_S: Final = 60.0  # for a client that sends its body slowly
BODY_IS_HERE: Final = "mxn.body_is_here"  # in a scope, by the server: reading it waits for nothing


class Endpoint:
    """An ASGI app around one handler; any exception becomes an answer in OpenAI's shape."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            response = await self._handler(request)
        except (ClientGone, ClientDisconnect):
            response = Response(status_code=499)  # nobody reads it; the number is for the log
        except Exception as exc:  # the one place that turns failures into answers
            response = response_on(scope["path"], from_exception(exc))
        await response(scope, receive, send)


async def parse(request: Request, type: type[T], max_body_bytes: int) -> T:
    """Read and check a JSON body.

    Raises: ApiError 413 for a body over the limit, 400 with `param` for anything wrong in it.
    """
    body = await read_body(request, max_body_bytes)
    check_shape(body)
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as exc:
        raise explain(exc, body) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError(f"The body is not valid JSON: {exc}", code="invalid_json") from None


def check_shape(body: bytes) -> None:
    """Refuse JSON that is small in bytes and huge in memory. Raises: ApiError."""
    if len(body) < _COUNTED_BYTES:
        return
    num = body.count(b"[") + body.count(b"{")
    if num <= MAX_CONTAINERS and body.count(b'"') // 2 <= MAX_STRINGS:
        return
    # Many of them may stand in a text, such as a program: without escapes, every second piece
    # between quotes is outside of strings.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    num_strings = plain.count(b'"') // 2
    if num_strings > MAX_STRINGS:
        raise _too_many("strings", num_strings, MAX_STRINGS)
    if plain.count(b"[") + plain.count(b"{") <= MAX_CONTAINERS:
        return
    num = sum(part.count(b"[") + part.count(b"{") for part in plain.split(b'"')[::2])
    if num > MAX_CONTAINERS:
        raise _too_many("lists and objects", num, MAX_CONTAINERS)


def _too_many(what: str, num: int, limit: int) -> ApiError:
    return ApiError(
        f"The body has {num} {what}; at most {limit} are taken.",
        status=413,
        code="request_too_large",
    )


async def read_body(request: Request, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return the whole body. Raises: ApiError 413, or 408 when it takes longer than `timeout_s`."""
    if BODY_IS_HERE in request.scope:
        return await _read_body(request, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(request, max_bytes)
    except TimeoutError:
        raise ApiError(
            f"The body did not arrive within {timeout_s:g} s.",
            status=408,
            type="timeout_error",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"The body is larger than the limit of {max_bytes} bytes.",
        status=413,
        code="request_too_large",
        # The rest of the body is not read, so the connection cannot be used again.
        headers={"connection": "close"},
    )


def explain(exc: msgspec.ValidationError, body: bytes) -> ApiError:
    """Name the field, what it must be and what was sent."""
    text = str(exc)
    match = _PATH.search(text)
    path = match["path"] if match else ""
    what = text[: match.start()] if match else text
    shown = _value_at(body, path) if "[..." not in path else None
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        path = f"{path}.{missing[1]}"
    param = path.removeprefix(".").split("[...]")[0] or None
    prefix = f"{param}: " if param else ""
    got = f", got {shown}" if shown is not None and "got" not in what and not missing else ""
    return ApiError(f"{prefix}{what}{got}", param=param)


def _value_at(body: bytes, path: str) -> str | None:
    """Return the JSON of the value at a path such as `.messages[0].role`, or None if it is long."""
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # the type was wrong before the rest turned out not to be JSON
    for step in _STEP.finditer(path):
        try:
            value = value[step["key"] if step["key"] is not None else int(step["index"])]
        except (KeyError, IndexError, TypeError):
            return None  # such as `[...]`, which msgspec writes for keys of an object
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_CHARS else None


def json_response(
    body: Any, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection. Call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, cancelled at once when the client goes away.

    Starlette does not do this for handlers that answer in one piece.
    Raises: ClientGone.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        watcher.cancel()
        await stop(worker)


async def stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until its clean-up has run; its outcome is the owner's business."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen
