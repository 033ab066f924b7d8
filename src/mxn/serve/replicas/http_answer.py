"""An HTTP answer that is arriving: its head, what has come of its body, and how it can fail.

Knows neither sockets nor the parser; the connection fills it, whoever sent the request reads it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from mxn.errors import EngineDiedError

_MAX_REFUSAL_BYTES = 1 << 20

Header = tuple[bytes, bytes]


class ConnectionLost(EngineDiedError):
    """The server could not be reached, went away, fell silent or does not speak HTTP.

    `has_answered` says whether a byte of an answer had come; without one, nothing was promised.
    """

    def __init__(self, message: str, *, has_answered: bool = False, is_silence: bool = False):
        super().__init__(message, retry_after_s=1.0)
        self.has_answered = has_answered
        self.is_silence = is_silence


class Source(Protocol):
    """What an answer asks of the connection that fills it."""

    @property
    def max_answer_bytes(self) -> int: ...

    def resume(self) -> None:
        """Read on, if unread bytes had stopped it."""
        ...

    def abandon(self) -> None:
        """Nobody wants the rest."""
        ...


class Answer:
    """An answer that is arriving. `status` and `headers` (lower-case names) are complete.

    Its connection fills it and sets `error` or `is_done`; `connection` is None from then on.
    """

    __slots__ = ("_waiter", "connection", "deadline_s", "error", "has_head", "headers", "is_done",
                 "is_whole", "max_bytes", "parts", "silence_s", "size", "status")  # fmt: skip

    def __init__(self, connection: Source, silence_s: float, deadline_s: float, whole: bool):
        self.connection: Source | None = connection
        self.parts: list[bytes] = []
        self.size = 0
        self.is_done = False
        self.error: ConnectionLost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.is_whole = whole
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
        while not self.parts:
            if self.error is not None:
                raise self.error
            if self.is_done:
                return b""
            await self.wait()
        return self.take()

    async def read(self) -> bytes:
        """Return the rest of the body of a refusal, up to 1 MB.

        Raises: ConnectionLost, also for a body that is too long.
        """
        self.is_whole = True
        self.max_bytes = min(self.max_bytes, _MAX_REFUSAL_BYTES)
        if self.connection is not None:
            self.connection.resume()
        while not self.is_done and self.error is None:
            await self.wait()
        if self.error is not None:
            raise self.error
        return self.take()

    def close(self) -> None:
        """Give up: unless the answer has ended, its connection is closed at once."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abandon()

    def take(self) -> bytes:
        """Return what is here, and read on where the socket had been left alone."""
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.parts = []
        self.size = 0
        if self.connection is not None:
            self.connection.resume()
        return data

    async def arrive(self) -> None:
        """Wait until the head has come, or all of it where it is read as a whole."""
        while not self.is_done and self.error is None and (self.is_whole or not self.has_head):
            await self.wait()

    async def wait(self) -> None:
        """Return at the next `wake`."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
