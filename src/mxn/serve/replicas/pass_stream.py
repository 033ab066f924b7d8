"""Streams of foreign servers on their way out: one send for each read of the socket.

Start at `PassStream`. Knows ASGI and the events of OpenAI's routes; asks no server itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mxn.errors import DeadlineError
from mxn.ledger.types import CloseReason
from mxn.serve.http import disconnected, stop
from mxn.serve.openai.errors import ClientGone, from_exception
from mxn.serve.openai.stream import DONE, PING, event
from mxn.serve.openai.types import CompletionTokensDetails, PromptTokensDetails, Usage
from mxn.serve.replicas.continuing import is_opening
from mxn.serve.replicas.counting import Counts
from mxn.serve.replicas.sse import Batch, Choice, Chunk, Renamer
from mxn.serve.replicas.upstream_plan import Plan
from mxn.serve.replicas.upstream_run import UpstreamRun, status_of

_PATIENCE_S = 0.05  # before anybody looks whether the client is still there
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def headers_of(plan: Plan) -> list[tuple[bytes, bytes]]:
    """Return who served it, as far as it is known when the head leaves."""
    hop = plan.context.hops[-1] if plan.context.hops else None
    name = "".join(char if " " <= char <= "~" else "?" for char in plan.model)
    headers = [(b"x-mxn-model", name.encode())]
    if hop is not None:
        headers.append((b"x-mxn-device", f"{hop.replica} {hop.chip}".strip().encode("latin-1")))
    return headers


async def settle_failed(run: UpstreamRun, exc: BaseException) -> None:
    """Close the row of a request that failed or whose client went away."""
    reason: CloseReason = "error"
    if isinstance(exc, ClientGone | asyncio.CancelledError | GeneratorExit):
        reason = "client_gone"
    elif isinstance(exc, DeadlineError):
        reason = "timeout"
    elif run.counter.num_events:
        reason = "replica_lost"
    await run.settle(reason, 499 if reason == "client_gone" else status_of(exc))


class Watch:
    """Cancels the work inside when the client goes away; free while it takes a few milliseconds."""

    def __init__(self, receive: Receive, run: UpstreamRun) -> None:
        self._receive = receive
        self._run = run
        self._watcher: asyncio.Task[None] | None = None
        self._is_gone = False
        self._work: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Watch:
        self._work = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_PATIENCE_S, self._begin, loop)
        return self

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            await stop(self._watcher)
        if self._is_gone and isinstance(exc, asyncio.CancelledError) and self._work is not None:
            self._work.uncancel()
            raise ClientGone from None

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watcher = loop.create_task(self._look())

    async def _look(self) -> None:
        await disconnected(self._receive)
        if self._work is not None and not self._run.is_closing:
            self._is_gone = True
            self._work.cancel()


class Beat:
    """Sends `: ping` into a silent stream; like `Watch`, nothing happens in a short one."""

    def __init__(self, stream: PassStream, send: Send, every_s: float) -> None:
        self._stream, self._send, self._every_s = stream, send, every_s
        self._task: asyncio.Task[None] | None = None
        self._seen = 0
        self._timer = asyncio.get_running_loop().call_later(every_s, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self._stream.num_sent == self._seen and not self._stream.is_sending:
            self._task = loop.create_task(self._stream.push(self._send, PING))
        self._seen = self._stream.num_sent
        self._timer = loop.call_later(self._every_s, self._look)

    async def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            await self._task


class WholeAnswer(Response):
    """A finished body; two messages, no header objects."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *headers,
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )  # fmt: skip
        await send({"type": "http.response.body", "body": self.body})


class PassStream(Response):
    """A stream of a foreign server, one send for each read of it."""

    def __init__(self, run: UpstreamRun, renamer: Renamer, heartbeat_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.num_sent = 0
        self.is_sending = False
        self._run = run
        self._renamer = renamer
        self._heartbeat_s = heartbeat_s
        self._num_replicas = 0
        self._has_usage = False  # the counts of the whole answer are out
        self._wants_usage = bool(
            run.plan.head.stream_options and run.plan.head.stream_options.include_usage
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        beat = Beat(self, send, self._heartbeat_s)
        try:
            async with Watch(receive, self._run):
                await self._produce(send)
        except ClientGone as exc:
            await settle_failed(self._run, exc)
        except BaseException as exc:
            await settle_failed(self._run, exc)
            if not isinstance(exc, Exception):
                raise
            error = from_exception(exc)
            if not self.num_sent:
                await error.response()(scope, receive, send)
            else:
                await self.push(send, event(error.body()) + DONE, is_last=True)
        finally:
            await beat.end()

    async def _produce(self, send: Send) -> None:
        run = self._run
        async with contextlib.aclosing(run.batches()) as batches:
            async for batch in batches:
                data = self._bytes(batch)
                if run.is_over:
                    if self._wants_usage and not self._has_usage:
                        data += _usage_event(run)
                    await run.settle("complete")
                    await self.push(send, data + DONE, is_last=True)
                elif data:
                    await self.push(send, data)

    def _bytes(self, batch: Batch) -> bytes:
        """Return a batch as our events."""
        run = self._run
        chunks = batch.chunks
        if run.num_replicas != self._num_replicas:  # another server has taken over, or the first
            is_takeover = self.num_sent > 0
            self._num_replicas = run.num_replicas
            self._renamer = Renamer(run.plan.id, run.plan.model)
            if is_takeover and chunks and all(_only_opens(item) for item in chunks[0].choices):
                del batch.blocks[0], chunks[0]
        if chunks and chunks[-1].usage is not None and _tells_all(chunks[-1]):
            if self._wants_usage:
                self._has_usage = True
                if run.counter.counts(is_complete=True).basis != "server":
                    batch.blocks[-1] = _with_usage(batch.blocks[-1], run)
            elif not chunks[-1].choices:
                batch = Batch(batch.blocks[:-1], chunks[:-1], batch.is_done)
        return self._renamer.rename(batch)

    async def push(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        """Send bytes, after the head if it has not left yet."""
        self.is_sending = True
        try:
            self.num_sent += 1
            if self.num_sent == 1:
                headers = [*_STREAM_HEADERS, *headers_of(self._run.plan)]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
        finally:
            self.is_sending = False


def _only_opens(choice: Choice) -> bool:
    return choice.finish_reason is None and is_opening(choice)


def _tells_all(chunk: Chunk) -> bool:
    """Whether the counts of a chunk are those of the whole answer."""
    return not chunk.choices or any(choice.finish_reason for choice in chunk.choices)


def _usage_event(run: UpstreamRun) -> bytes:
    """Return the event with our counts, where the server's did not come."""
    plan = run.plan
    value = {
        "id": plan.id,
        "object": "chat.completion.chunk" if plan.is_chat else "text_completion",
        "created": int(time.time()),
        "model": plan.model,
        "choices": [],
        "usage": usage_of(run.counter.counts(is_complete=True)),
    }
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _with_usage(block: bytes, run: UpstreamRun) -> bytes:
    """Return a usage event that counts what every server of this answer made."""
    fields = _fields_decoder.decode(block[6:])
    fields["usage"] = msgspec.Raw(
        msgspec.json.encode(usage_of(run.counter.counts(is_complete=True)))
    )
    return b"data: " + msgspec.json.encode(fields)


def usage_of(counts: Counts) -> Usage:
    """Return our counts as an answer says them."""
    return Usage(
        prompt_tokens=counts.input,
        completion_tokens=counts.output,
        total_tokens=counts.input + counts.output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=counts.reasoning),
    )
