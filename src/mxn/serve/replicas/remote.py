"""RemoteEngine: a model of another mxn server as a replica of this one.

Speaks the replica protocol of `server.py`. A server that is killed ends every request at once with
EngineDiedError; one whose machine vanished does so after a few missed heartbeats. Knows no routing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar, cast
from urllib.parse import quote

import msgspec

from mxn.engine.client import error_of
from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Encode,
    Encoded,
    EngineStats,
    Failed,
    Generate,
    LoadAdapter,
    ModelInfo,
    UnloadAdapter,
)
from mxn.errors import (
    AuthError,
    EngineDiedError,
    ForbiddenError,
    InternalError,
    MxnError,
    NotFoundError,
    OverloadedError,
    UserError,
)
from mxn.serve.replicas.frames import Answered, Unpacker
from mxn.serve.replicas.http_client import Answer, ConnectionLost, HttpClient, HttpLimits
from mxn.serve.replicas.server import HEARTBEAT_S
from mxn.serve.replicas.sse import clipped

T = TypeVar("T")

log = logging.getLogger("mxn.serve")

_KEY_REFUSED = frozenset({401, 403})
_SILENCE_S = 4 * HEARTBEAT_S
_PROBE_S = (0.2, 0.5, 1.0, 2.0)  # pauses between attempts to find a lost server again
_encoder = msgspec.msgpack.Encoder()


class RemoteEngine:
    """An `EngineClient` over the network. Make it with `connect`."""

    def __init__(
        self, url: str, model: str, *, key: str | None = None, limits: HttpLimits | None = None
    ) -> None:
        """`url` is the server's base address; `model` its name for the model."""
        headers = [(b"content-type", b"application/msgpack")]
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        self.url = url.rstrip("/")
        self.model = model
        self._http = HttpClient(self.url, headers=headers, limits=limits)
        self._query = f"?model={quote(model, safe='')}"
        self._info: ModelInfo | None = None
        self._is_healthy = False
        self._probing: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, url: str, model: str, *, key: str | None = None, limits: HttpLimits | None = None
    ) -> RemoteEngine:
        """Return a replica that has said what it is.

        Raises: EngineDiedError when the server cannot be reached, NotFoundError for an unknown
        model, AuthError or ForbiddenError for the key.
        """
        engine = cls(url, model, key=key, limits=limits)
        try:
            await engine.refresh()
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "use RemoteEngine.connect"
        return self._info

    @property
    def is_healthy(self) -> bool:
        """Whether the last request reached the server; a lost one is looked for all the time."""
        return self._is_healthy

    async def refresh(self) -> ModelInfo:
        """Ask the server what the replica is. Raises: like `connect`."""
        self._info = await self._get("/replica/info", ModelInfo)
        self._is_healthy = True
        return self._info

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`; closing the iterator cancels."""
        async with contextlib.aclosing(self._post("/replica/generate", request)) as frames:
            async for messages in frames:
                for message in messages:
                    delta = _expect(message, Delta)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        raise self._lost(f"{self.url} ended an answer before its last token")

    async def encode(self, request: Encode) -> Encoded:
        return await self._one("/replica/encode", request, Encoded)

    async def stats(self) -> EngineStats:
        return await self._get("/replica/stats", EngineStats)

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded:
        return await self._one("/replica/adapters", request, AdapterLoaded)

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded:
        return await self._one("/replica/adapters", request, AdapterLoaded)

    async def close(self) -> None:
        """Forget the connections; the server goes on."""
        self._is_healthy = False
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing
            self._probing = None
        await self._http.close()

    async def _one(self, path: str, request: msgspec.Struct, kind: type[T]) -> T:
        async with contextlib.aclosing(self._post(path, request)) as frames:
            async for messages in frames:
                for message in messages:
                    return _expect(message, kind)
        raise self._lost(f"{self.url} ended an answer without its result")

    async def _post(self, path: str, request: Any) -> AsyncGenerator[list[Answered], None]:
        """Send a message and yield the frames of its answer. Raises: MxnError."""
        answer: Answer | None = None
        body = _encoder.encode(request)
        try:
            answer = await self._http.open("POST", path + self._query, body, silence_s=_SILENCE_S)
            if answer.status != 200:
                raise self._refused(answer.status, await answer.read())
            unpacker = Unpacker()
            while data := await answer.next():
                for messages in unpacker.feed(data):
                    if messages:
                        self._is_healthy = True
                        yield messages
        except ConnectionLost as exc:
            raise self._lost(exc.message) from exc
        except (msgspec.MsgspecError, ValueError) as exc:
            if isinstance(exc, MxnError):
                raise
            raise self._lost(f"{self.url} sent what is no frame: {exc}") from exc
        finally:
            if answer is not None:
                answer.close()

    async def _get(self, path: str, kind: type[T]) -> T:
        try:
            answer, body = await self._http.fetch("GET", path + self._query, silence_s=_SILENCE_S)
        except ConnectionLost as exc:
            raise self._lost(exc.message) from exc
        if answer.status != 200:
            raise self._refused(answer.status, body)
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError as exc:
            raise self._lost(f"{self.url} is no mxn server of this version: {exc}") from exc

    def _refused(self, status: int, body: bytes) -> MxnError:
        """Return what to raise for an answer that is none.

        A key that does not work is the operator's matter once we are connected: who sent the
        request has shown a good one to us, and another replica may take it.
        """
        if status not in _KEY_REFUSED or self._info is None:
            return _error_for(status, body, self.url)
        if self._is_healthy:
            why = "is not known there" if status == 401 else "may not use this replica"
            log.error("replica %s answers %d: our key %s (any more)", self.url, status, why)
        return self._lost(f"{self.url} refuses our key ({status})")

    def _lost(self, message: str) -> EngineDiedError:
        """Note that the server is gone, begin to look for it, and return what to raise."""
        self._is_healthy = False
        if self._info is not None and (self._probing is None or self._probing.done()):
            self._probing = asyncio.get_running_loop().create_task(self._look_for_it())
        return EngineDiedError(message, retry_after_s=_PROBE_S[-1])

    async def _look_for_it(self) -> None:
        attempt = 0
        while not self._is_healthy:
            await asyncio.sleep(_PROBE_S[min(attempt, len(_PROBE_S) - 1)])
            attempt += 1
            with contextlib.suppress(MxnError):  # what is wrong is told to whoever asks for tokens
                await self.refresh()


def _expect(message: Answered, kind: type[T]) -> T:
    if isinstance(message, Failed):
        raise error_of(message)
    if not isinstance(message, kind):
        got = type(message).__name__  # not what is in it, which may be an answer
        raise InternalError(f"expected {kind.__name__} from a replica, got {got}")
    return cast("T", message)


def _error_for(status: int, body: bytes, url: str) -> MxnError:
    """Return the error for an answer that is no frames; a `body` not in OpenAI's shape is shown."""
    message, code = f"{url} answered {status}: {body[:200]!r}", None
    with contextlib.suppress(msgspec.MsgspecError, KeyError, TypeError):
        error = cast("dict[str, Any]", msgspec.json.decode(body)["error"])
        message, code = f"{url}: {clipped(error['message'])}", error.get("code")
    if status == 401:
        return AuthError(message)
    if status == 403:
        return ForbiddenError(message)
    if status == 404:
        return NotFoundError(message, code=code)
    if status == 429:
        return OverloadedError(message)
    if status >= 500:
        return EngineDiedError(message, retry_after_s=1.0)
    return UserError(message, code=code)
