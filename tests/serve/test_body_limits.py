"""Bodies that are small in bytes and huge in memory, or that never arrive, hold nobody up."""

from __future__ import annotations

import time

import anyio
import pytest
from starlette.requests import Request

from mxn.serve.http import MAX_CONTAINERS, MAX_STRINGS, check_shape, read_body
from mxn.serve.openai.errors import ApiError

PADDING = b" " * (1 << 20)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * MAX_CONTAINERS + b"[]]",
        b"[" + b'{"a":{}},' * (MAX_CONTAINERS // 2) + b"{}]",
        b"[" + b'"",' * MAX_STRINGS + b'""]',
        b'["\\\\",' + b"[]," * MAX_CONTAINERS + b"[]]",
        b'["\\"",' + b"[]," * MAX_CONTAINERS + b"[]]",
    ],
    ids=["lists", "objects", "strings", "after an escaped backslash", "after an escaped quote"],
)
def test_too_many_pieces_are_refused_quickly(body):
    begun_s = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        check_shape(body + PADDING)
    assert caught.value.status == 413
    assert time.perf_counter() - begun_s < 0.5


@pytest.mark.parametrize(
    "text",
    [b"[{" * 600_000, b'\\"[' * 600_000, b"\\\\[" * 600_000],
    ids=["plain", "quote", "slash"],
)
def test_brackets_within_a_text_are_no_containers(text):
    check_shape(b'{"messages": [{"role": "user", "content": "' + text + b'"}]}')


def test_a_body_that_stops_arriving_is_given_up():
    async def receive():
        await anyio.sleep(60)

    async def work():
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        return await read_body(request, 1000, timeout_s=0.05)

    with pytest.raises(ApiError) as caught:
        anyio.run(work)
    assert caught.value.status == 408
    assert caught.value.headers == {"connection": "close"}
