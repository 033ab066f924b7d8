"""The HTTP client against servers that mean harm, and against its own limits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from mxn.errors import OverloadedError
from mxn.serve.replicas.http_client import ConnectionLost, HttpClient, HttpLimits
from mxn.serve.replicas.http_connection import Connection

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


def on(
    answer: Callable[[], Iterable[bytes]],
    work: Callable[[HttpClient], Awaitable[Any]],
    **limits: Any,
) -> tuple[Any, int]:
    """Return what `work` returns, and how many bytes the server could send to it."""
    num_sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                for part in answer():
                    writer.write(part)
                    await writer.drain()
                    num_sent += len(part)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left, which is what it should do
        finally:
            writer.close()

    async def main() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}", limits=HttpLimits(**limits))
        try:
            async with asyncio.timeout(20):
                return await work(client)
        finally:
            await client.close()
            server.close()

    return asyncio.run(main()), num_sent


def endless(head: bytes, part: bytes) -> Callable[[], Iterable[bytes]]:
    most = (64 << 20) // len(part)  # a client without a limit would take them all
    return lambda: itertools.chain([head], itertools.repeat(part, most))


async def read_all(client: HttpClient) -> None:
    answer = await client.open("GET", "/")
    while await answer.next():
        pass


@pytest.mark.parametrize(
    "answer",
    [
        endless(OK, b"x-a: " + b"y" * 1000 + b"\r\n"),
        endless(OK + b"x-a: ", b"y" * 1000),
        endless(OK, b"x" * 1000),
        endless(b"HTTP/1.1 200 ", b"O" * 1000),
        endless(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 20),
        endless(CHUNKED + b"5;x=", b"y" * 1000),
        endless(CHUNKED + b"1\r\na\r\n0\r\nx-a: ", b"y" * 1000),
        endless(CHUNKED + b"1\r\na\r\n0\r\n", b"x-a: " + b"y" * 1000 + b"\r\n"),
    ],
    ids=["fields", "value", "name", "status", "hints", "extension", "trailer", "trailers"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_no_body_has_an_end(answer: Callable[[], Iterable[bytes]], whole: bool) -> None:
    async def work(client: HttpClient) -> None:
        with pytest.raises(ConnectionLost, match=r"65536 bytes of header|not HTTP"):
            await (client.fetch("GET", "/") if whole else read_all(client))

    _, num_sent = on(answer, work)
    assert num_sent < 32 << 20, "the rest is in the buffers of the two sockets"


def test_a_large_body_a_long_head_and_hints_are_taken() -> None:
    body = b"x" * (4 << 20)
    head = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 20
    head += OK + b"".join(b"x-%d: %b\r\n" % (at, b"y" * 900) for at in range(50))
    head += b"content-length: %d\r\n\r\n" % len(body)

    async def work(client: HttpClient) -> tuple[int, bytes]:
        for _ in range(3):  # on one connection: nothing is counted twice
            answer, got = await client.fetch("GET", "/")
        assert client.num_connections == 1
        return len(answer.headers), got

    (num_headers, got), _ = on(lambda: [head, body], work)
    assert num_headers == 51
    assert got == body


def test_many_tiny_chunks_count_as_what_they_cost() -> None:
    async def work(client: HttpClient) -> None:
        with pytest.raises(ConnectionLost, match="more than 1048576 bytes"):
            await client.fetch("GET", "/")

    on(endless(CHUNKED, b"1\r\na\r\n" * 1000), work, max_answer_bytes=1 << 20)


@pytest.mark.parametrize("is_given", [True, False])
def test_a_waiter_whose_time_is_over_keeps_no_connection(
    is_given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: HttpClient) -> None:
        first = await client.open("GET", "/")
        connection = first.connection
        assert isinstance(connection, Connection)
        given: list[bool] = []

        class Timeout:
            """Ends in the very turn in which the waiter is served."""

            async def __aenter__(self) -> None: ...

            async def __aexit__(self, *error: object) -> None:
                if not given:
                    given.append(True)
                    raise TimeoutError

        monkeypatch.setattr(asyncio, "timeout_at", lambda until_s: Timeout())
        late = asyncio.create_task(client.open("GET", "/"))
        await asyncio.sleep(0)
        (waiter,) = client._waiting
        if is_given:
            connection._answer = None
            client.give_back(connection)
        else:
            client._pass_turn()
        assert waiter.done()
        with pytest.raises(OverloadedError):
            await late
        assert client._free == ([connection] if is_given else [])

    on(lambda: [OK + b"content-length: 9\r\n\r\n"], work, max_connections=1)


def test_a_refusal_has_an_end() -> None:
    async def work(client: HttpClient) -> None:
        answer = await client.open("GET", "/")
        with pytest.raises(ConnectionLost, match="more than 1048576 bytes"):
            await answer.read()

    head = b"HTTP/1.1 500 X\r\ncontent-length: 99999999\r\n\r\n"
    _, num_sent = on(endless(head, b"y" * 10000), work)
    assert num_sent < 32 << 20
