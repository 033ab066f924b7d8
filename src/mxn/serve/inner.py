"""Requests that a server makes to itself, such as lines of a batch: no socket, same handlers."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

from mxn.serve.batch.worker import Answer, Call
from mxn.serve.context import RequestContext
from mxn.serve.gateway import CONTEXT


def caller(app: ASGIApp) -> Call:
    """Return a function that posts a JSON body to a path of `app` under a given context."""

    async def call(path: str, body: bytes, context: RequestContext) -> Answer:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
            CONTEXT: context,
        }
        exchange = _Exchange(body)
        await app(scope, exchange.receive, exchange.send)
        return exchange.status, exchange.headers, b"".join(exchange.parts)

    return call


class _Exchange:
    """The two ends of a connection that nobody closes."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.status = 500
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # the client stays
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in message["headers"]
            }
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))
