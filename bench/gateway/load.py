"""A load generator in one process: N connections, each sends its next request when it has answered.

The same for every server under test (the stub itself, mxn, others). Each answer is checked: its
status, that it is complete, that it carries the mark of its own request; and every so often all of
its JSON. Start at `measure`.

    python bench/gateway/load.py http://127.0.0.1:8000 --model stub --connections 16 --stream
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Literal, cast
from urllib.parse import urlsplit

Kind = Literal["chat", "stream", "embeddings"]
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_FULL_CHECK_EVERY = 50
_PATHS = {
    "chat": "/v1/chat/completions",
    "stream": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`errors` counts wrong, broken or (all of them) missing answers; `first_error` says how."""

    kind: Kind
    connections: int
    seconds: float
    num_answers: int
    errors: int
    rate_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    first_byte_p50_ms: float
    first_error: str | None = None


@dataclass(slots=True)
class Tally:
    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    errors: int = 0
    first_error: str | None = None

    def wrong(self, what: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or what


class Caller(asyncio.Protocol):
    """One connection of the closed loop."""

    def __init__(self, run: Run, number: int) -> None:
        self._run = run
        self._number = number
        self._count = 0
        self._mark = b""
        self._buffer = b""
        self._sent_s = 0.0
        self._first_s = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.send()

    def send(self) -> None:
        self._count += 1
        self._mark = b"#%d-%d#" % (self._number, self._count)
        self._buffer = b""
        self._first_s = 0.0
        self._sent_s = time.perf_counter()
        self._transport.write(self._run.request(self._mark))

    def data_received(self, data: bytes) -> None:
        if not self._first_s:
            self._first_s = time.perf_counter()
        self._buffer = self._buffer + data if self._buffer else data
        size = complete_size(self._buffer)
        if size is None:
            return
        now_s = time.perf_counter()
        run = self._run
        if run.is_counting:
            run.tally.latencies_s.append(now_s - self._sent_s)
            run.tally.first_s.append(self._first_s - self._sent_s)
        what = run.check(self._buffer, self._mark, is_full=self._count % _FULL_CHECK_EVERY == 1)
        if len(self._buffer) > size:
            what = what or f"{len(self._buffer) - size} bytes after the end"
        if what is not None:
            run.tally.wrong(what)
        if run.is_over:
            self._transport.close()
        elif what is not None:
            self._transport.abort()
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.is_over:
            self._run.tally.wrong(f"connection lost: {exc}; had {self._buffer[:200]!r}")
            self._run.reconnect(self._number)


def complete_size(data: bytes) -> int | None:
    """Return how many bytes the answer at the start of `data` has, None while it is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    found = _LENGTH.search(data, 0, end + 2)
    if found:
        total = end + 4 + int(found[1])
        return total if len(data) >= total else None
    # An answer in chunks ends with an empty one; nothing follows it, since one is asked at a time.
    return len(data) if data.endswith(b"\r\n0\r\n\r\n") else None


def body_of(data: bytes) -> bytes:
    """Return the body of one complete answer, its chunks joined."""
    end = data.index(b"\r\n\r\n")
    rest = data[end + 4 :]
    if not _CHUNKED.search(data, 0, end + 2):
        return rest
    parts = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        num_bytes = int(size.split(b";")[0], 16)
        if not num_bytes:
            return b"".join(parts)
        parts.append(rest[:num_bytes])
        rest = rest[num_bytes + 2 :]


class Run:
    """What all connections of one measurement share."""

    def __init__(self, url: str, kind: Kind, *, model: str, key: str | None, chunks: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.kind: Kind = kind
        self.tally = Tally()
        self.is_counting = False
        self.is_over = False
        self._chunks = chunks
        self._head = (
            f"POST {parts.path.rstrip('/')}{_PATHS[kind]} HTTP/1.1\r\nhost: {self.host}\r\n"
            "content-type: application/json\r\n"
            + (f"authorization: Bearer {key}\r\n" if key else "")
        ).encode()
        body: dict[str, object] = {"model": model}
        if kind == "embeddings":
            body["input"] = "say MARK"
        else:
            body |= {"messages": [{"role": "user", "content": "say MARK"}], "max_tokens": 64}
        if kind == "stream":
            body["stream"] = True
        self._before, self._after = json.dumps(body).encode().split(b"MARK")
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self, mark: bytes) -> bytes:
        size = len(self._before) + len(mark) + len(self._after)
        return b"%bcontent-length: %d\r\n\r\n%b%b%b" % (
            self._head, size, self._before, mark, self._after
        )  # fmt: skip

    def check(self, data: bytes, mark: bytes, *, is_full: bool) -> str | None:
        """Return what is wrong with a complete answer, None when it is right."""
        if not data.startswith(b"HTTP/1.1 200"):
            return data[:600].decode(errors="replace")
        if self.kind == "embeddings":
            return _check_embedding(body_of(data)) if is_full else None
        if mark not in data:
            return f"the mark {mark!r} is missing in {data[:600]!r}"
        if self.kind == "chat":
            return self._check_chat(body_of(data), mark) if is_full else None
        if is_full:
            return self._check_stream(body_of(data), mark)
        if b"data: [DONE]" not in data or data.count(b"data: ") < self._chunks + 2:
            return f"a stream with {data.count(b'data: ')} events"
        return None

    def _check_chat(self, body: bytes, mark: bytes) -> str | None:
        answer = json.loads(body)
        choice = answer["choices"][0]
        words = choice["message"]["content"].removeprefix(mark.decode()).split()
        if words != [f"word{index}" for index in range(self._chunks)]:
            return f"wrong text {choice['message']['content']!r}"
        if choice["finish_reason"] != "stop" or not answer["usage"]["completion_tokens"]:
            return f"wrong end {body[-300:]!r}"
        return None

    def _check_stream(self, body: bytes, mark: bytes) -> str | None:
        blocks = body.decode().split("\n\n")
        events = [json.loads(block[6:]) for block in blocks if block.startswith("data: {")]
        choices = [event["choices"][0] for event in events if event.get("choices")]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        if text.removeprefix(mark.decode()).split() != [f"word{n}" for n in range(self._chunks)]:
            return f"wrong text {text!r}"
        reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        return None if reasons == ["stop"] else f"finish reasons {reasons}"

    def reconnect(self, number: int) -> None:
        task = asyncio.get_running_loop().create_task(self.connect(number, after_s=0.05))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def connect(self, number: int, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: Caller(self, number), self.host, self.port)
        except OSError as exc:
            self.tally.wrong(f"cannot connect: {exc}")
            if not self.is_over:
                self.reconnect(number)


def _check_embedding(body: bytes) -> str | None:
    rows = json.loads(body)["data"]
    return None if len(rows) == 1 and rows[0]["embedding"] else f"no vector in {body[:200]!r}"


async def measure(
    url: str,
    kind: Kind,
    *,
    model: str,
    connections: int,
    seconds: float = 5.0,
    warm_s: float = 0.5,
    key: str | None = None,
    chunks: int = 32,
) -> Result:
    """Load `url` (a base address) for `seconds` after `warm_s` and return what was seen."""
    run = Run(url, kind, model=model, key=key, chunks=chunks)
    await asyncio.gather(*(run.connect(number) for number in range(connections)))
    await asyncio.sleep(warm_s)
    run.is_counting = True
    started_s = time.perf_counter()
    await asyncio.sleep(seconds)
    run.is_over = True
    elapsed_s = time.perf_counter() - started_s
    run.is_counting = False
    latencies = sorted(run.tally.latencies_s)
    if not latencies:
        run.tally.wrong("no answer at all")
    await asyncio.sleep(0.2)  # the last answers come in, so that no server sees a broken connection
    return Result(
        kind=kind,
        connections=connections,
        seconds=round(elapsed_s, 3),
        num_answers=len(latencies),
        errors=run.tally.errors,
        rate_per_s=round(len(latencies) / elapsed_s, 1),
        p50_ms=_percentile(latencies, 0.50),
        p90_ms=_percentile(latencies, 0.90),
        p99_ms=_percentile(latencies, 0.99),
        first_byte_p50_ms=_percentile(sorted(run.tally.first_s), 0.50),
        first_error=run.tally.first_error,
    )


def _percentile(values: list[float], share: float) -> float:
    if not values:
        return float("nan")
    return round(1000 * values[min(len(values) - 1, int(share * len(values)))], 3)


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="stub")
    parser.add_argument("--key")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--kind", choices=list(_PATHS), nargs="+", default=["chat", "stream"])
    options = parser.parse_args()
    for kind in options.kind:
        for connections in options.connections:
            result = uvloop.run(
                measure(
                    options.url,
                    kind,
                    model=options.model,
                    connections=connections,
                    seconds=options.seconds,
                    key=options.key,
                    chunks=options.chunks,
                )
            )
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
