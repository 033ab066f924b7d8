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
from urllib.parse import urlsplit

from mxn.errors import ConfigError, OverloadedError
from mxn.serve.context import current
from mxn.serve.replicas.http_answer import Answer, ConnectionLost, Header
from mxn.serve.replicas.http_connection import Connection, HttpLimits

__all__ = ["Answer", "ConnectionLost", "HttpClient", "HttpLimits"]

_TICK_S = 0.5  # how exactly time limits are kept


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
        self._free: list[Connection] = []
        self._all: set[Connection] = set()
        self._num_opening = 0
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
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
            await answer.arrive()
            error = answer.error
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
        return answer, answer.take()

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

    def give_back(self, connection: Connection) -> None:
        """A connection's answer has ended and it can be used again."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        connection.idle_since = self.now_s
        self._free.append(connection)

    def forget(self, connection: Connection) -> None:
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

    def _pop(self) -> Connection | None:
        """Return the connection used last; the others get old and are closed."""
        while self._free:
            connection = self._free.pop()
            if connection.is_open:
                return connection
        return None

    async def _obtain(self) -> Connection:
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

    def _hand_on(self, connection: Connection | None) -> None:
        """What a cancelled waiter was given goes to the next one."""
        if connection is not None and connection.is_open:
            self.give_back(connection)
        else:
            self._pass_turn()

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> Connection:
        if self._is_closed:
            raise ConnectionLost(f"the client of {self.url} is closed")
        self._num_opening += 1
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._tls
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


def _fixed_headers(host: bytes, headers: Iterable[Header]) -> bytes:
    lines = [(b"host", host), (b"user-agent", b"mxn"), (b"content-type", b"application/json")]
    given = {name.lower(): value for name, value in headers}
    merged = {**dict(lines), **given}
    for name, value in merged.items():
        if any(byte < 32 or byte == 127 for byte in name + value):
            raise ConfigError(f"header {name.decode('latin-1')!r} holds a control character")
    return b"".join(b"%b: %b\r\n" % item for item in merged.items())
