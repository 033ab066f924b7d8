"""The routes under /replica/*: this server's models as replicas of another mxn server.

Token ids in, frames of deltas out, over one chunked answer; closing the connection cancels. A key
needs the scope `replica`. Knows the replica contract and its frames, no chat and no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Encode,
    Failed,
    Generate,
    LoadAdapter,
    UnloadAdapter,
)
from mxn.errors import ForbiddenError, InternalError, MxnError, UnsupportedError
from mxn.serve.adapters import allowed_path
from mxn.serve.context import current
from mxn.serve.http import disconnected, read_body, stop
from mxn.serve.openai.errors import ApiError, from_exception
from mxn.serve.openapi import Operation
from mxn.serve.replicas.frames import MEDIA_TYPE, Answered, failed_of, pack
from mxn.serve.served import ServedModel
from mxn.serve.state import State

T = TypeVar("T")

HEARTBEAT_S = 5.0  # of silence, after which an empty frame says that this server is alive
_MAX_PENDING = 256  # messages that wait for a slow reader before its replica's iterator does
_ADAPTER_MESSAGES = LoadAdapter | UnloadAdapter


def replica_operations(state: State) -> list[Operation]:
    """Return the rows of the route table."""
    routes = ReplicaRoutes(state)
    return [
        _row("GET", "/replica/info", routes.info, "What a replica is (MessagePack)"),
        _row("GET", "/replica/stats", routes.stats, "A replica's counters (MessagePack)"),
        _row("POST", "/replica/generate", routes.generate, "Tokens for token ids (frames)"),
        _row("POST", "/replica/encode", routes.encode, "Vectors of token ids (frames)"),
        _row("GET", "/replica/adapters", routes.adapters, "Names of loaded adapters (MessagePack)"),
        _row("POST", "/replica/adapters", routes.change_adapter, "Load or unload an adapter"),
    ]


def _row(
    method: str, path: str, handler: Callable[[Request], Awaitable[Response]], summary: str
) -> Operation:
    media_type = "application/msgpack" if method == "GET" else MEDIA_TYPE
    return Operation(
        method=method, path=path, handler=handler, summary=summary, media_type=media_type
    )


class ReplicaRoutes:
    """Handlers; each takes the model's name as the query parameter `model`."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def info(self, request: Request) -> Response:
        return _message(self._model(request).info)

    async def stats(self, request: Request) -> Response:
        return _message(await self._model(request).client.stats())

    async def generate(self, request: Request) -> Response:
        message = await self._read(request, Generate)
        model = self._model(request)
        return FrameStream(message.request_id, _deltas(model, message))

    async def encode(self, request: Request) -> Response:
        message = await self._read(request, Encode)
        model = self._model(request)
        return FrameStream(message.request_id, _once(model.client.encode(message)))

    async def adapters(self, request: Request) -> Response:
        model = self._model(request)
        names = tuple(getattr(model.client, "adapters", ()))
        return _message(AdapterLoaded(request_id="", adapters=names))

    async def change_adapter(self, request: Request) -> Response:
        message = await self._read(request, _ADAPTER_MESSAGES)
        model = self._model(request)
        return FrameStream(message.request_id, _once(self._change(model.client, message)))

    async def _change(self, client: object, message: LoadAdapter | UnloadAdapter) -> AdapterLoaded:
        """Refusals travel in frames: a status of 403 would say that the key is not welcome."""
        return await _change_adapter(client, self._checked(message))

    def _checked(self, message: LoadAdapter | UnloadAdapter) -> LoadAdapter | UnloadAdapter:
        """Return what may be done. Raises: ForbiddenError.

        A gateway passes on what its own admins load, with a key of the scope `replica`. Such a key
        loads from the operator's folder only, and leaves alone what this server serves itself.
        """
        if any(item.adapter == message.name for item in self._state.models.adapters()):
            raise ForbiddenError(
                f"the adapter {message.name!r} is served by this server itself",
                hint="choose another name, or unload it here: POST /v1/unload_lora_adapter",
            )
        if isinstance(message, UnloadAdapter):
            return message
        folder, principal = self._state.settings.adapter_folder, current().principal
        if folder is None and principal is not None and "admin" not in principal.scopes:
            raise ForbiddenError(
                f"the key {principal.key_id!r} has no scope 'admin', and this server has no folder "
                "that adapters may be loaded from",
                hint="start it with --lora-folder, or use a key that has both scopes",
            )
        return msgspec.structs.replace(message, path=allowed_path(message.path, folder))

    def _model(self, request: Request) -> ServedModel:
        principal = current().principal
        if principal is not None and "replica" not in principal.scopes:
            raise ForbiddenError(
                f"the key {principal.key_id!r} has no scope 'replica'",
                hint="make one with: mxn keys create --scope replica",
            )
        return self._state.find(request.query_params.get("model"))

    async def _read(self, request: Request, type: Any) -> Any:
        body = await read_body(request, self._state.settings.max_body_bytes)
        try:
            return msgspec.msgpack.decode(body, type=type)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            what = f"The body is no MessagePack message of this route: {exc}"
            raise ApiError(what, code="invalid_message") from None


class FrameStream(Response):
    """Sends the messages of a generator as frames; what comes while a send waits goes together."""

    def __init__(self, request_id: str, messages: AsyncGenerator[Answered, None]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [(b"content-type", MEDIA_TYPE.encode()), (b"cache-control", b"no-store")]
        self._request_id = request_id
        self._messages = messages
        self._pending: list[Answered] = []
        self._is_over = False
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(self._collect()),
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(self._send_all(send)),
        ]
        try:
            await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                await stop(task)

    async def _collect(self) -> None:
        try:
            async with aclosing(self._messages) as messages:
                async for message in messages:
                    self._pending.append(message)
                    self._came.set()
                    if len(self._pending) >= _MAX_PENDING:
                        self._room.clear()
                        await self._room.wait()
        except Exception as exc:  # the other side raises it as its own
            self._pending.append(_failed(self._request_id, exc))
        self._is_over = True
        self._came.set()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        while not (self._is_over and not self._pending):
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._came.wait()
            except TimeoutError:
                pass  # an empty frame follows
            self._came.clear()
            pending, self._pending = self._pending, []
            self._room.set()
            frame = pack(pending)
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _deltas(model: ServedModel, message: Generate) -> AsyncGenerator[Delta, None]:
    deltas = cast("AsyncGenerator[Delta, None]", model.client.generate(message))
    async with aclosing(deltas):
        async for delta in deltas:
            yield delta


async def _once(work: Awaitable[T]) -> AsyncGenerator[T, None]:
    yield await work


async def _change_adapter(client: object, message: LoadAdapter | UnloadAdapter) -> AdapterLoaded:
    name = "load_adapter" if isinstance(message, LoadAdapter) else "unload_adapter"
    change = getattr(client, name, None)
    if change is None:
        raise UnsupportedError("this replica takes no adapters")
    return await change(message)


def _failed(request_id: str, error: Exception) -> Failed:
    if isinstance(error, MxnError):
        return failed_of(request_id, error)
    told = from_exception(error)  # logs what is a bug, and tells nothing of it
    return failed_of(request_id, InternalError(told.message))


def _message(message: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    own = {"content-type": "application/msgpack", **(headers or {})}
    return Response(msgspec.msgpack.encode(message), headers=own)
