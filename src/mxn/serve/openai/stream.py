"""Server-sent events: an ASGI response that starts late, breathes, and stops when the client goes.

Headers wait for the first chunk, so that a request the replica refuses still gets a real status.
Chunks are bytes made by the caller; this file knows no chunk shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mxn.serve.dialects import body_on, response_on
from mxn.serve.http import disconnected, stop
from mxn.serve.openai.errors import ApiError, ClientGone, from_exception

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
)


def event(payload: object) -> bytes:
    """Return one `data:` event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class EventStream(Response):
    """Sends the events of a generator; closing the generator is what cancels its work."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        heartbeat_s: float,
        done: bytes = DONE,
        ping: bytes = PING,
        error_event: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        """`done`, `ping` and `error_event` are what other protocols than OpenAI's send instead."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._done = done
        self._ping = ping
        self._error_event = error_event
        self._path = ""
        own = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
        self.raw_headers = [*_HEADERS, *own]
        self._sending = asyncio.Lock()
        self._has_started = False
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream beside a watch on the connection and a heartbeat."""
        self._path = scope["path"]
        producer = asyncio.create_task(self._produce(send))
        watcher = asyncio.create_task(disconnected(receive))
        heart = asyncio.create_task(self._beat(send))
        try:
            await asyncio.wait({producer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watcher, heart, producer):
                await stop(task)
        failure = None if producer.cancelled() else producer.exception()
        if isinstance(failure, ApiError):
            await response_on(self._path, failure)(scope, receive, send)
        elif failure is not None and not isinstance(failure, OSError | ClientGone):
            raise failure

    async def _produce(self, send: Send) -> None:
        """Send every event, then `[DONE]`. Raises: ApiError only while nothing has been sent."""
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await self._send(send, data)
            except Exception as exc:
                error = from_exception(exc)
                if not self._has_started:
                    raise error from None
                await self._send(send, self._event_of(error))
        if self._done:
            await self._send(send, self._done)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event_of(self, error: ApiError) -> bytes:
        if self._error_event is not None:
            return self._error_event(error)
        return event(body_on(self._path, error))

    async def _send(self, send: Send, data: bytes) -> None:
        async with self._sending:
            if not self._has_started:
                self._has_started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            self._num_sent += 1
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _beat(self, send: Send) -> None:
        """Send a comment after each silent interval: a long prefill must not look dead."""
        seen = -1
        while True:
            seen = self._num_sent
            await asyncio.sleep(self._heartbeat_s)
            if self._num_sent == seen:
                await self._send(send, self._ping)
