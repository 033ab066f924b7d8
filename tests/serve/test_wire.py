"""Heads leave with their first body bytes, and never later than the loop's next turn."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import pytest

from mxn.serve.http import BODY_IS_HERE
from mxn.serve.server import running

ANSWERS = {
    "/whole": [(b"one", False)],
    "/empty": [(b"", False)],
    "/stream": [(b"one", True), (b"two", True), (b"", False)],
    "/head": [(b"HTTP/1.1 200 looks like a head", True), (b"HTTP/1.1 ", False)],
    "/late": [(None, True), (b"late", False)],
}


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["path"] == "/body":
        text = b"here" if BODY_IS_HERE in scope else b"to come"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})
        return
    parts = ANSWERS[scope["path"]]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for body, more in parts:
        if body is None:
            await asyncio.sleep(0.3)
            continue
        await send({"type": "http.response.body", "body": body, "more_body": more})
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def address():
    with running(app) as url:
        yield urlsplit(url)


def ask(address, path: str, extra: bytes = b"") -> socket.socket:
    sock = socket.create_connection((address.hostname, address.port), timeout=5)
    sock.sendall(b"GET %b HTTP/1.1\r\nhost: x\r\n%b\r\n" % (path.encode(), extra))
    return sock


def read_all(sock: socket.socket) -> bytes:
    with sock:
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("path", ["/whole", "/stream", "/head", "/empty"])
def test_every_byte_arrives_in_order(address, path):
    data = read_all(ask(address, path, b"connection: close\r\n"))
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    bodies = [body for body, _ in ANSWERS[path] if body]
    assert rest == b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


def test_the_head_and_the_first_bytes_come_in_one_packet(address):
    with ask(address, "/stream") as sock:
        first = sock.recv(65536)
    assert first.startswith(b"HTTP/1.1 200")
    assert first.endswith(b"3\r\none\r\n")


def test_a_head_does_not_wait_for_a_late_body(address):
    with ask(address, "/late") as sock:
        assert sock.recv(65536).endswith(b"\r\n\r\n")
        assert sock.recv(65536).startswith(b"4\r\nlate")


def test_only_a_body_that_arrived_as_a_whole_is_marked(address):
    head = b"POST /body HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 4\r\n\r\n"
    for first, rest, said in ((head + b"full", b"", b"here"), (head + b"ha", b"lf", b"to come")):
        with socket.create_connection((address.hostname, address.port), timeout=5) as sock:
            sock.sendall(first)
            data = sock.recv(65536)
            sock.sendall(rest)
        assert said in data
