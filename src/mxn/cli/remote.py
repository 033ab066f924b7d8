"""Calls to a server's HTTP API for commands that use one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from mxn.errors import MxnError, UserError


def check(response: Any) -> dict[str, Any]:
    """Return the JSON of an answer. Raises: UserError or MxnError with the server's message."""
    if response.is_success:
        return response.json()
    raise _error(response.status_code, response.content)


def _error(status: int, body: bytes) -> MxnError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {status}"
    return (UserError if 400 <= status < 500 else MxnError)(message)


def is_here(url: str) -> bool:
    """Return whether a URL is one of this machine: only such a server gets this machine's key."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host in ("0.0.0.0", "::", "::1") or host.startswith("127.")


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a server into an error that names it. Raises: MxnError."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise MxnError(f"no answer from {url}: {reason}", hint="`mxn ps` lists servers") from error


async def stream_chat(http: Any, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yield the text of a streamed chat completion."""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if not response.is_success:
            raise _error(response.status_code, await response.aread())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise MxnError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
