"""Writes the head of an answer together with its first body bytes.

uvicorn writes them one after another: two system calls, two packets, and a client woken
twice. That costs a tenth of a short request. Bodies that have arrived whole are marked, so that
nobody sets a timer for them. Start at `Http`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mxn.serve.http import BODY_IS_HERE

_HEAD = b"HTTP/1.1 "
_CONTINUE = b"HTTP/1.1 100 "


class Joined:
    """A transport that holds a head until the next write, at most until the loop's next turn."""

    __slots__ = ("_call_soon", "_head", "_transport", "_write")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write: Callable[[bytes], None] = transport.write
        self._call_soon = asyncio.get_running_loop().call_soon
        self._head = b""

    def write(self, data: bytes) -> None:
        head = self._head
        if head:
            self._head = b""
            self._write(head + data)
        elif data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
            self._call_soon(self._flush)
        else:
            self._write(data)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._flush()
        self._transport.set_protocol(protocol)


class Http(HttpToolsProtocol):
    """uvicorn's protocol on a `Joined` transport, with a mark on requests that are complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", Joined(transport)))

    def on_message_complete(self) -> None:
        cast("dict[str, Any]", self.scope)[BODY_IS_HERE] = True
        super().on_message_complete()
