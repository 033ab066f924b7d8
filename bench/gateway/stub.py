"""A server that answers OpenAI's chat, completions and embeddings routes without thinking.

Stands for a replica that costs nothing, so that what is measured is the gateway before it. Written
on bare asyncio: it must never be what limits. A mark `#…#` in the body comes back in the answer,
which lets a load generator check that answers are not mixed up.

    python bench/gateway/stub.py --port 9000 --chunks 32 --token-s 0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

MODEL = "stub"
PROMPT_TOKENS = 7
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_LIMIT = re.compile(rb'"max_tokens"\s*:\s*(\d{1,6})')
_MARK = re.compile(rb"#[^#\"\\]{1,64}#")
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: "


def word(index: int) -> str:
    """Return the text of chunk `index`."""
    return f"word{index} "


class Answers:
    """The bytes of every kind of answer, made once; `#` stands where the mark goes."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": chunks,
            "total_tokens": PROMPT_TOKENS + chunks,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        base = {"id": "stub-1", "created": 1_700_000_000, "model": MODEL}
        text = "MARK" + "".join(word(index) for index in range(chunks))
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        self.chat = _json(
            {
                **base,
                "object": "chat.completion",
                "choices": [{**choice, "message": {"role": "assistant", "content": text}}],
                "usage": usage,
            }
        )
        self.text = _json(
            {
                **base,
                "object": "text_completion",
                "choices": [{**choice, "text": text}],
                "usage": usage,
            }
        )
        vector = [round(0.001 * index, 3) for index in range(384)]
        self.embedding = _json(
            {
                "object": "list",
                "model": MODEL,
                "data": [{"object": "embedding", "index": 0, "embedding": vector}],
                "usage": {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS},
            }
        )
        self.models = _json({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        self.events = {
            "chat": _events(base, chunks, is_chat=True),
            "text": _events(base, chunks, is_chat=False),
        }
        self.usage_event = _event(
            {**base, "object": "chat.completion.chunk", "choices": [], "usage": usage}
        )


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: object) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _events(base: dict[str, object], chunks: int, *, is_chat: bool) -> list[bytes]:
    """Return role event (chat), one event for each word, the first with the mark, and the end."""
    kind = "chat.completion.chunk" if is_chat else "text_completion"

    def one(piece: str | None, reason: str | None, role: str | None = None) -> bytes:
        delta = {"content": piece} if piece is not None else {}
        if role:
            delta = {"role": role, "content": ""}
        inner = {"delta": delta} if is_chat else {"text": piece or ""}
        choice = {"index": 0, **inner, "logprobs": None, "finish_reason": reason}
        return _event({**base, "object": kind, "choices": [choice]})

    words = [one(("" if index else "MARK") + word(index), None) for index in range(chunks)]
    return [*([one(None, None, "assistant")] if is_chat else []), *words, one(None, "stop")]


_by_length: dict[int, Answers] = {}


class Stub(asyncio.Protocol):
    """One connection; requests on it are answered in order."""

    def __init__(self, answers: Answers, token_s: float, is_sized: bool = False) -> None:
        self._answers = answers
        self._is_sized = is_sized
        self._token_s = token_s
        self._buffer = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            found = _LENGTH.search(head)
            size = int(found[1]) if found else 0
            if len(self._buffer) < end + 4 + size:
                return
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        answers = self._as_long_as_asked(body) if self._is_sized else self._answers
        found = _MARK.search(body)
        mark = found[0] if found else b""
        if path.endswith(b"/embeddings"):
            self._whole(answers.embedding)
        elif path.endswith(b"/models"):
            self._whole(answers.models)
        elif not path.endswith(b"completions"):
            self._transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        elif _STREAM.search(body):
            events = answers.events["chat" if b"chat" in path else "text"]
            tail = answers.usage_event if _USAGE.search(body) else b""
            self._stream(events, mark, tail + b"data: [DONE]\n\n")
        else:
            whole = answers.chat if b"chat" in path else answers.text
            self._whole(whole.replace(b"MARK", mark, 1))

    def _as_long_as_asked(self, body: bytes) -> Answers:
        """Return answers with as many words as `max_tokens` says."""
        found = _LIMIT.search(body)
        chunks = int(found[1]) if found else self._answers.chunks
        if chunks not in _by_length:
            _by_length[chunks] = Answers(chunks)
        return _by_length[chunks]

    def _whole(self, body: bytes) -> None:
        head = b"%bapplication/json\r\ncontent-length: %d\r\n\r\n" % (_HEAD, len(body))
        self._transport.write(head + body)

    def _stream(self, events: list[bytes], mark: bytes, tail: bytes) -> None:
        """Send each event in a write of its own, as servers do that make one token after another"""
        head = _HEAD + b"text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        pieces = [_chunk(event.replace(b"MARK", mark, 1)) for event in events[:2]]
        pieces = [head + pieces[0], *pieces[1:], *(_chunk(event) for event in events[2:])]
        pieces.append(_chunk(tail) + b"0\r\n\r\n")
        if self._token_s:
            self._paced(pieces, 0)
            return
        for piece in pieces:
            self._transport.write(piece)

    def _paced(self, pieces: list[bytes], at: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(pieces[at])
        if at + 1 < len(pieces):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._token_s, self._paced, pieces, at + 1)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(
    port: int = 0, *, chunks: int = 32, token_s: float = 0.0, is_sized: bool = False
) -> None:
    """Serve on loopback until cancelled; print the address once it is listening.

    `is_sized`: `max_tokens` of a request, not `chunks`, says how long its answer is.
    """
    answers = Answers(chunks)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Stub(answers, token_s, is_sized), "127.0.0.1", port, backlog=2048
    )
    host, bound = server.sockets[0].getsockname()[:2]
    print(f"http://{host}:{bound}", flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def running_stub(
    *, chunks: int = 32, token_s: float = 0.0, port: int = 0, is_sized: bool = False
) -> Iterator[str]:
    """Run the stub in a process of its own; yield its base URL."""
    command = [sys.executable, str(Path(__file__).resolve()), "--port", str(port)]
    command += ["--chunks", str(chunks), "--token-s", str(token_s)]
    command += ["--sized"] if is_sized else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--token-s", type=float, default=0.0, help="pause before each chunk")
    parser.add_argument("--sized", action="store_true", help="as many chunks as max_tokens says")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(
            serve(
                options.port,
                chunks=options.chunks,
                token_s=options.token_s,
                is_sized=options.sized,
            )
        )


if __name__ == "__main__":
    main()
