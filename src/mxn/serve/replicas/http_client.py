"""A small HTTP/1.1 client for one origin: keep-alive connections, answers piece by piece.

One wake-up of the caller for each read of the socket, no task and no timer for a request: time
limits are kept by one clock for all connections. Knows bytes only, no JSON and no models.
Start at `HttpClient.open` (streams) and `HttpClient.fetch` (whole answers).
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from mxn.errors import ConfigError, EngineDiedError, OverloadedError
from mxn.serve.context import current

_HIGH_BYTES = 1 << 20  # unread bytes of one answer at which its socket is no longer read
_TICK_S = 0.5  # how exactly time limits are kept
# Bytes without any of a body: heads (also those of "continue" and the like, together), trailers,
# and the lines between the chunks.
_MAX_HEAD_BYTES = 64 << 10
_MAX_REFUSAL_BYTES = 1 << 20
_PART_BYTES = 64  # what a piece costs beside its bytes, as chunks may be tiny
_ONE_READ_BYTES = 64 << 10  # a body up to this size leaves together with its head

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """`idle_s` is below the keep-alive time of common servers (uvicorn: 5 s), so that it is this
    side that closes. `silence_s` is the longest time without a byte while an answer is due."""

    max_connections: int = 1024
    connect_s: float = 5.0
    idle_s: float = 4.0
    silence_s: float = 600.0
    wait_s: float = 30.0  # for a free connection, when all are in use
    max_answer_bytes: int = 256 << 20  # of an answer that is read as a whole


class ConnectionLost(EngineDiedError):
    """The server could not be reached, went away, fell silent or does not speak HTTP.

    `has_answered` says whether a byte of an answer had come; without one, nothing was promised.
    """

    def __init__(self, message: str, *, has_answered: bool = False, is_silence: bool = False):
        super().__init__(message, retry_after_s=1.0)
        self.has_answered = has_answered
        self.is_silence = is_silence


class Answer:
    """An answer that is arriving. `status` and `headers` (lower-case names) are complete."""

    __slots__ = ("_connection", "_done", "_error", "_parts", "_size", "_waiter", "_whole",
                 "deadline_s", "has_head", "headers", "max_bytes", "silence_s",
                 "status")  # fmt: skip

    def __init__(self, connection: _Connection, silence_s: float, deadline_s: float, whole: bool):
        self._connection: _Connection | None = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._done = False
        self._error: ConnectionLost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._whole = whole
        self.has_head = False
        self.status = 0
        self.headers: list[Header] = []
        self.silence_s = silence_s
        self.deadline_s = deadline_s
        self.max_bytes = connection.max_answer_bytes

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def next(self) -> bytes:
        """Return what has arrived since the last call, at least one byte; b"" at the end.

        Raises: ConnectionLost; everything that came before is returned first.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._done:
                return b""
            await self._wait()
        return self._take()

    async def read(self) -> bytes:
        """Return the rest of the body of a refusal, up to 1 MB.

        Raises: ConnectionLost, also for a body that is too long.
        """
        self._whole = True
        self.max_bytes = min(self.max_bytes, _MAX_REFUSAL_BYTES)
        if self._connection is not None:
            self._connection.resume()
        while not self._done and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        return self._take()

    def close(self) -> None:
        """Give up: unless the answer has ended, its connection is closed at once."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def _take(self) -> bytes:
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts = []
        self._size = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection. The parser calls the `on_…` methods; the client owns it between answers."""

    __slots__ = ("_answer", "_body_bytes", "_client", "_ends_at_eof", "_has_bytes", "_head_bytes",
                 "_idle_bytes", "_is_paused", "_parser", "_transport", "idle_since", "is_open",
                 "last_s", "uses")  # fmt: skip

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._is_paused = False
        self._ends_at_eof = True
        self._has_bytes = False
        self._head_bytes = 0  # of header fields of this answer, and of trailers
        self._idle_bytes = 0  # that came since the last byte of a body
        self._body_bytes = 0
        self.is_open = False
        self.idle_since = 0.0
        self.last_s = 0.0
        self.uses = 0

    def send(
        self, data: bytes, body: bytes, silence_s: float, deadline_s: float, whole: bool
    ) -> Answer:
        """Write a request; the answer fills itself from now on."""
        transport = self._transport
        assert transport is not None
        assert self._answer is None
        answer = self._answer = Answer(self, silence_s, deadline_s, whole)
        self.uses += 1
        self._has_bytes = False
        self._head_bytes = self._idle_bytes = self._body_bytes = 0
        self._ends_at_eof = True
        self.last_s = self._client.now_s
        if len(body) <= _ONE_READ_BYTES:
            transport.write(data + body)
        else:
            transport.writelines((data, body))
        return answer

    @property
    def max_answer_bytes(self) -> int:
        return self._client.limits.max_answer_bytes

    def resume(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abandon(self) -> None:
        self._answer = None
        self.shut()

    def shut(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def check(self, now_s: float) -> None:
        """Fail the answer if one of its limits has passed. Called by the clock."""
        answer = self._answer
        if answer is None or self._is_paused:  # a slow reader is not the server's silence
            self.last_s = now_s if self._is_paused else self.last_s
            return
        if now_s - self.last_s > answer.silence_s:
            self._fail(f"sent nothing for {answer.silence_s:g} s", is_silence=True)
        elif now_s > answer.deadline_s:
            self._fail("did not finish before the deadline", is_silence=True)

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked: an answer to nothing, or bytes after the end
            self.shut()
            return
        self.last_s = self._client.now_s
        self._has_bytes = True
        num_body = self._body_bytes
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"sent what is not HTTP ({exc})")
            return
        # The parser keeps what is incomplete, so fields are counted before they are whole too.
        self._idle_bytes = 0 if self._body_bytes > num_body else self._idle_bytes + len(data)
        if not answer._done and max(self._idle_bytes, self._head_bytes) > _MAX_HEAD_BYTES:
            self._fail(f"sent more than {_MAX_HEAD_BYTES} bytes of header fields")
            return
        if answer._done or not answer._whole:
            if answer.has_head:
                answer._wake()
            if answer._size > _HIGH_BYTES and not answer._done and self._transport is not None:
                self._is_paused = True
                self._transport.pause_reading()
        elif answer._size > answer.max_bytes:
            self._fail(f"sent more than {answer.max_bytes} bytes")

    def eof_received(self) -> None:
        answer = self._answer
        if answer is not None and answer.has_head and self._ends_at_eof:
            self._end(can_stay=False)
            answer._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._client.forget(self)
        self._fail("closed the connection" if exc is None else f"is gone ({exc})")

    # -- the parser's side

    def on_message_begin(self) -> None:
        if self._answer is None:  # an answer to nothing must not become the next request's
            self.shut()

    def on_header(self, name: bytes, value: bytes) -> None:
        answer = self._answer
        self._head_bytes += len(name) + len(value)
        if answer is None or answer.has_head:
            return  # a trailer
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self._ends_at_eof = False
        answer.headers.append((name, value))

    def on_headers_complete(self) -> None:
        answer = self._answer
        if answer is None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # "continue", early hints: the real head follows
            answer.headers.clear()
            return
        answer.status = status
        answer.has_head = True

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        self._body_bytes += len(body)
        if answer is not None:
            answer._parts.append(body)
            answer._size += len(body) + _PART_BYTES

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is not None and answer.has_head:
            self._end(can_stay=self._parser.should_keep_alive())

    def _end(self, *, can_stay: bool) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        answer._done = True
        answer._connection = None
        if self._is_paused:
            self.resume()
        if can_stay and self.is_open:
            self._client.give_back(self)
        else:
            self.shut()

    def _fail(self, what: str, *, is_silence: bool = False) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer._error = ConnectionLost(
                f"{self._client.url} {what}", has_answered=self._has_bytes, is_silence=is_silence
            )
            answer._connection = None
            answer._wake()
        if self.is_open:
            self.shut()


class HttpClient:
    """Requests to one origin, such as ``http://10.0.0.7:8000/v1``; belongs to one event loop.

    `url` may have a path, which stands before every path asked for.
    """

    def __init__(
        self, url: str, *, headers: Iterable[Header] = (), limits: HttpLimits | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{url!r} is not an address of a server", hint="such as http://10.0.0.7:8000"
            )
        try:
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"{url!r}: {exc}") from None
        self.url = url.rstrip("/")
        self.limits = limits or HttpLimits()
        self.now_s = 0.0
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/").encode()
        self._fixed = _fixed_headers(parts.netloc.rpartition("@")[2].encode(), headers)
        self._heads: dict[tuple[str, str], bytes] = {}
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._num_opening = 0
        self._waiting: deque[asyncio.Future[_Connection | None]] = deque()
        self._clock: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def num_connections(self) -> int:
        return len(self._all) + self._num_opening

    async def open(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: bytes = b"",
        *,
        silence_s: float | None = None,
        deadline_s: float = float("inf"),
        whole: bool = False,
    ) -> Answer:
        """Send a request and return its answer once the head has come (`whole`: all of it).

        `headers` are complete lines, each with its CRLF; `deadline_s` is on the loop's clock. A
        kept connection that turns out to be closed before a byte came back is tried again once,
        on a new one: servers close idle connections at any moment.
        Raises: ConnectionLost, OverloadedError when no connection was free in time.
        """
        traceparent = current().traceparent
        if traceparent:
            headers += b"traceparent: %b\r\n" % traceparent
        data = self._head(method, path) + b"content-length: %d\r\n%b\r\n" % (len(body), headers)
        silence_s = self.limits.silence_s if silence_s is None else silence_s
        while True:
            connection = self._pop() or await self._obtain()
            is_kept = connection.uses > 0
            answer = connection.send(data, body, silence_s, deadline_s, whole)
            await _head_of(answer)
            error = answer._error
            if error is None or (answer.has_head and not whole):
                return answer
            if error.has_answered or error.is_silence or not is_kept:
                raise error

    async def fetch(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: bytes = b"",
        *,
        silence_s: float | None = None,
        deadline_s: float = float("inf"),
    ) -> tuple[Answer, bytes]:
        """Send a request and return its whole answer and body. Raises: like `open`."""
        answer = await self.open(
            method, path, body, headers, silence_s=silence_s, deadline_s=deadline_s, whole=True
        )
        return answer, answer._take()

    async def close(self) -> None:
        """Close every connection; answers under way fail."""
        self._is_closed = True
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        for connection in list(self._all):
            connection.shut()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        await asyncio.sleep(0)  # lets the transports say that they are closed

    def give_back(self, connection: _Connection) -> None:
        """A connection's answer has ended and it can be used again."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        connection.idle_since = self.now_s
        self._free.append(connection)

    def forget(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        self._pass_turn()

    def _pass_turn(self) -> None:
        """Let one waiter open the connection that there is room for now."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _head(self, method: str, path: str) -> bytes:
        head = self._heads.get((method, path))
        if head is None:
            line = b"%b %b%b HTTP/1.1\r\n" % (method.encode(), self._base, path.encode("ascii"))
            head = line + self._fixed
            if len(self._heads) < 256:  # paths come from code, but some carry a name
                self._heads[method, path] = head
        return head

    def _pop(self) -> _Connection | None:
        """Return the connection used last; the others get old and are closed."""
        while self._free:
            connection = self._free.pop()
            if connection.is_open:
                return connection
        return None

    async def _obtain(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._clock is None:
            self._tick(loop)
        until_s = loop.time() + self.limits.wait_s
        while self.num_connections >= self.limits.max_connections:
            waiter = loop.create_future()
            self._waiting.append(waiter)
            try:
                async with asyncio.timeout_at(until_s):
                    connection = await waiter
            except TimeoutError:
                if waiter.done() and not waiter.cancelled():  # it came in the same turn
                    self._hand_on(waiter.result())
                raise OverloadedError(
                    f"all {self.limits.max_connections} connections to {self.url} are in use"
                ) from None
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._hand_on(waiter.result())
                raise
            if connection is not None and connection.is_open:
                return connection
        return await self._connect(loop)

    def _hand_on(self, connection: _Connection | None) -> None:
        """What a cancelled waiter was given goes to the next one."""
        if connection is not None and connection.is_open:
            self.give_back(connection)
        else:
            self._pass_turn()

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> _Connection:
        if self._is_closed:
            raise ConnectionLost(f"the client of {self.url} is closed")
        self._num_opening += 1
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._tls
                )
            self._all.add(connection)
            return connection
        except TimeoutError:
            limit = self.limits.connect_s
            raise ConnectionLost(f"{self.url} took no connection within {limit:g} s") from None
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise ConnectionLost(f"{self.url} takes no connections ({reason})") from None
        finally:
            self._num_opening -= 1
            if connection is None:
                self._pass_turn()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at all connections now and in a while; stops itself when there are none."""
        self.now_s = now_s = loop.time()
        for connection in list(self._all):
            connection.check(now_s)
        oldest_s = now_s - self.limits.idle_s
        for connection in [item for item in self._free if item.idle_since < oldest_s]:
            self._free.remove(connection)
            connection.shut()
        is_needed = (self._all or self._num_opening or self._clock is None) and not self._is_closed
        self._clock = loop.call_later(_TICK_S, self._tick, loop) if is_needed else None


async def _head_of(answer: Answer) -> None:
    """Wait until the head of an answer has come, or all of it where it is read as a whole."""
    while not answer._done and answer._error is None and (answer._whole or not answer.has_head):
        await answer._wait()


def _fixed_headers(host: bytes, headers: Iterable[Header]) -> bytes:
    lines = [(b"host", host), (b"user-agent", b"mxn"), (b"content-type", b"application/json")]
    given = {name.lower(): value for name, value in headers}
    merged = {**dict(lines), **given}
    for name, value in merged.items():
        if any(byte < 32 or byte == 127 for byte in name + value):
            raise ConfigError(f"header {name.decode('latin-1')!r} holds a control character")
    return b"".join(b"%b: %b\r\n" % item for item in merged.items())
