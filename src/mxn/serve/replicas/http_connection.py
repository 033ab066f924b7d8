"""One HTTP/1.1 connection: writes a request, parses what comes back, and keeps limits.

Knows one answer at a time and whom to give itself back to; knows nothing of other connections,
of retries or of what a body means.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from mxn.serve.replicas.http_answer import Answer, ConnectionLost

_HIGH_BYTES = 1 << 20  # unread bytes of one answer at which its socket is no longer read
# Bytes without any of a body: heads (also those of "continue" and the like, together), trailers,
# and the lines between the chunks.
_MAX_HEAD_BYTES = 64 << 10
_PART_BYTES = 64  # what a piece costs beside its bytes, as chunks may be tiny
_ONE_READ_BYTES = 64 << 10  # a body up to this size leaves together with its head


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


class Owner(Protocol):
    """Who keeps a connection between two answers."""

    url: str
    limits: HttpLimits
    now_s: float

    def give_back(self, connection: Connection) -> None:
        """An answer has ended and the connection can be used again."""
        ...

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        ...


class Connection(asyncio.Protocol):
    """One connection. The parser calls the `on_…` methods; its owner has it between answers."""

    __slots__ = ("_answer", "_body_bytes", "_ends_at_eof", "_has_bytes", "_head_bytes",
                 "_idle_bytes", "_is_paused", "_owner", "_parser", "_transport",
                 "idle_since", "is_open", "last_s", "uses")  # fmt: skip

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
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
        self.last_s = self._owner.now_s
        if len(body) <= _ONE_READ_BYTES:
            transport.write(data + body)
        else:
            transport.writelines((data, body))
        return answer

    @property
    def max_answer_bytes(self) -> int:
        return self._owner.limits.max_answer_bytes

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
        self.last_s = self._owner.now_s
        self._has_bytes = True
        num_body = self._body_bytes
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"sent what is not HTTP ({exc})")
            return
        # The parser keeps what is incomplete, so fields are counted before they are whole too.
        self._idle_bytes = 0 if self._body_bytes > num_body else self._idle_bytes + len(data)
        if not answer.is_done and max(self._idle_bytes, self._head_bytes) > _MAX_HEAD_BYTES:
            self._fail(f"sent more than {_MAX_HEAD_BYTES} bytes of header fields")
            return
        if answer.is_done or not answer.is_whole:
            if answer.has_head:
                answer.wake()
            if answer.size > _HIGH_BYTES and not answer.is_done and self._transport is not None:
                self._is_paused = True
                self._transport.pause_reading()
        elif answer.size > answer.max_bytes:
            self._fail(f"sent more than {answer.max_bytes} bytes")

    def eof_received(self) -> None:
        answer = self._answer
        if answer is not None and answer.has_head and self._ends_at_eof:
            self._end(can_stay=False)
            answer.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._owner.forget(self)
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
            answer.parts.append(body)
            answer.size += len(body) + _PART_BYTES

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is not None and answer.has_head:
            self._end(can_stay=self._parser.should_keep_alive())

    def _end(self, *, can_stay: bool) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        answer.is_done = True
        answer.connection = None
        if self._is_paused:
            self.resume()
        if can_stay and self.is_open:
            self._owner.give_back(self)
        else:
            self.shut()

    def _fail(self, what: str, *, is_silence: bool = False) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.error = ConnectionLost(
                f"{self._owner.url} {what}", has_answered=self._has_bytes, is_silence=is_silence
            )
            answer.connection = None
            answer.wake()
        if self.is_open:
            self.shut()
