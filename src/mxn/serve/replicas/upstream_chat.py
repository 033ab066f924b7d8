"""Pass-through: chat, completions and embeddings of a model that foreign servers run.

Bodies go out almost as they came in and come back with our id and name. A stream costs one decode
of each event and one send for each read of the socket; an answer of a few milliseconds costs no
task and no timer that fires. Start at `UpstreamModel`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mxn.ledger.types import CloseReason, Ledger
from mxn.serve.chat.events import (
    ChatEvent,
    Finished,
    FinishReason,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from mxn.serve.context import RequestContext, current
from mxn.serve.http import disconnected, explain, stop
from mxn.serve.openai.errors import ApiError, ClientGone, from_exception
from mxn.serve.openai.stream import DONE, PING, event
from mxn.serve.openai.types import CompletionTokensDetails, PromptTokensDetails, Usage
from mxn.serve.replicas.continuing import is_opening
from mxn.serve.replicas.sse import Batch, Choice, Renamer, UpstreamUsage, clipped
from mxn.serve.replicas.upstream import Upstream, UpstreamConfig, UpstreamSet
from mxn.serve.replicas.upstream_run import (
    BYTES_PER_TOKEN,
    Account,
    Head,
    Plan,
    UpstreamRun,
    status_of,
)

_PATIENCE_S = 0.05  # before anybody looks whether the client is still there
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_head_decoder = msgspec.json.Decoder(Head)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _WholeMessage(msgspec.Struct):
    content: str | None = None


class _WholeChoice(msgspec.Struct):
    message: _WholeMessage | None = None
    text: str | None = None


class _Unmetered(msgspec.Struct):
    choices: list[_WholeChoice] = []


_usage_decoder = msgspec.json.Decoder(UpstreamUsage | None)


class UpstreamModel:
    """A model by name, and the servers that run it."""

    def __init__(
        self,
        name: str,
        upstreams: Sequence[UpstreamConfig],
        *,
        aliases: Sequence[str] = (),
        heartbeat_s: float = 15.0,
    ) -> None:
        self.name = name
        self.aliases = tuple(aliases)
        self.created = int(time.time())
        self.heartbeat_s = heartbeat_s
        self.upstreams = UpstreamSet([Upstream(config) for config in upstreams])
        chips = dict.fromkeys(item.config.chip for item in self.upstreams.all if item.config.chip)
        self.chips = tuple(chips)
        self._name_json = msgspec.Raw(msgspec.json.encode(name))

    @property
    def is_healthy(self) -> bool:
        return self.upstreams.is_healthy

    async def close(self) -> None:
        await self.upstreams.close()

    async def chat(self, request: Request, body: bytes, ledger: Ledger | None = None) -> Response:
        """Answer a body of /v1/chat/completions. Raises: ApiError, MxnError, ClientGone."""
        return await self._answer(request, body, "/v1/chat/completions", "chatcmpl-", ledger)

    async def completions(
        self, request: Request, body: bytes, ledger: Ledger | None = None
    ) -> Response:
        """Answer a body of /v1/completions. Raises: like `chat`."""
        return await self._answer(request, body, "/v1/completions", "cmpl-", ledger)

    async def embeddings(
        self, request: Request, body: bytes, ledger: Ledger | None = None
    ) -> Response:
        """Answer a body of /v1/embeddings. Raises: like `chat`."""
        return await self._answer(request, body, "/v1/embeddings", "embd-", ledger)

    async def run(
        self, body: bytes, ledger: Ledger | None = None, *, prefix: str = "chatcmpl-"
    ) -> UpstreamChatRun:
        """Return a `ChatRun` of a chat body, for protocols that write events of their own."""
        plan = self._plan(body, "/v1/chat/completions", prefix, current())
        plan.head.stream = True
        plan.fields["stream"] = msgspec.Raw(b"true")
        return UpstreamChatRun(await self._open(plan, ledger), self.name)

    def _plan(self, body: bytes, path: str, prefix: str, context: RequestContext) -> Plan:
        try:
            head = _head_decoder.decode(body)
            fields = _fields_decoder.decode(body)
        except msgspec.ValidationError as exc:
            raise explain(exc, body) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ApiError(f"The body is not valid JSON: {exc}", code="invalid_json") from None
        return Plan(
            id=prefix + uuid.uuid4().hex,
            model=self.name,
            path=path,
            head=head,
            fields=fields,
            body_bytes=len(body),
            context=context,
        )

    async def _open(self, plan: Plan, ledger: Ledger | None) -> UpstreamRun:
        account = Account(ledger)
        await account.open(plan, self.chips)
        return UpstreamRun(plan, self.upstreams, account)

    async def _answer(
        self, request: Request, body: bytes, path: str, prefix: str, ledger: Ledger | None
    ) -> Response:
        plan = self._plan(body, path, prefix, current())
        run = await self._open(plan, ledger)
        if plan.head.stream:
            return PassStream(run, Renamer(plan.id, self.name), self.heartbeat_s)
        try:
            async with Watch(request.receive, run):
                answer = await run.whole()
        except BaseException as exc:
            await settle_failed(run, exc)
            raise
        return await self._whole(run, answer)

    async def _whole(self, run: UpstreamRun, answer: bytes) -> Response:
        plan = run.plan
        try:
            fields = _fields_decoder.decode(answer)
            run.usage = _usage_decoder.decode(fields["usage"]) if "usage" in fields else None
            if run.usage is None:
                run.num_events = _estimate(answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            await run.settle("error", 502)
            message = f"The server of this model sent no JSON: {exc}"
            raise ApiError(message, status=502, type="server_error", code="bad_upstream") from None
        if "id" in fields:
            fields["id"] = msgspec.Raw(msgspec.json.encode(plan.id))
        fields["model"] = self._name_json
        await run.settle("complete")
        return WholeAnswer(msgspec.json.encode(fields), headers_of(plan))


def _estimate(answer: bytes) -> int:
    """Return roughly how many tokens an answer without counts has."""
    choices = msgspec.json.decode(answer, type=_Unmetered).choices
    texts = [choice.text or (choice.message and choice.message.content) or "" for choice in choices]
    return sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts)


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
    elif run.num_events:
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
        if chunks and not self._wants_usage:
            last = chunks[-1]
            if last.usage is not None and not last.choices:
                batch = Batch(batch.blocks[:-1], chunks[:-1], batch.is_done)
        elif run.num_replicas > 1 and chunks and chunks[-1].usage is not None:
            batch.blocks[-1] = _with_usage(batch.blocks[-1], run)
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


def _with_usage(block: bytes, run: UpstreamRun) -> bytes:
    """Return a usage event that counts what every server of this answer made."""
    fields = _fields_decoder.decode(block[6:])
    fields["usage"] = msgspec.Raw(msgspec.json.encode(usage_of(run)))
    return b"data: " + msgspec.json.encode(fields)


def usage_of(run: UpstreamRun) -> Usage:
    prompt, completion, _ = run.counts()
    usage = run.usage
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=usage.cached_tokens if usage else 0
        ),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=usage.reasoning_tokens if usage else 0
        ),
    )


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


_delta_decoder = msgspec.json.Decoder(_Delta | None)
_REASONS: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "tool_calls": "tool_calls",
    "function_call": "tool_calls", "content_filter": "content_filter",
}  # fmt: skip


class UpstreamChatRun:
    """A `ChatRun` over foreign servers. Log-probabilities stay out: they have no token ids."""

    def __init__(self, run: UpstreamRun, model: str) -> None:
        self._run = run
        self.id = run.plan.id
        self.model = model
        self.created = int(time.time())

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        """Yield events; the row is settled before the last `Finished` comes out."""
        run = self._run
        held: list[Finished] = []
        seen_calls: set[tuple[int, int]] = set()
        try:
            async with contextlib.aclosing(run.batches()) as batches:
                async for batch in batches:
                    for chunk in batch.chunks:
                        for choice in chunk.choices:
                            for item in _events_of(choice, seen_calls):
                                if isinstance(item, Finished):
                                    held.append(item)
                                else:
                                    yield item
            await run.settle("complete")
        except BaseException as exc:
            await settle_failed(run, exc)
            raise
        for finished in held:
            yield finished

    def usage(self) -> Usage:
        return usage_of(self._run)


def _events_of(choice: Choice, seen_calls: set[tuple[int, int]]) -> list[ChatEvent]:
    try:
        delta = _delta_decoder.decode(choice.delta)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        message = f"The server of this model sent a delta of an unknown shape: {clipped(exc)}"
        raise ApiError(message, status=502, type="server_error", code="bad_upstream") from None
    index = choice.index
    out: list[ChatEvent] = []
    if delta is not None:
        thought = delta.reasoning_content or delta.reasoning
        if thought:
            out.append(Reasoning(index, thought))
        if delta.content:
            out.append(Text(index, delta.content))
        for call in delta.tool_calls or ():
            if (index, call.index) not in seen_calls:
                seen_calls.add((index, call.index))
                call_id = call.id or f"call_{uuid.uuid4().hex[:24]}"
                out.append(ToolCallStart(index, call.index, call_id, call.function.name or ""))
            if call.function.arguments:
                out.append(ToolCallArguments(index, call.index, call.function.arguments))
    if choice.finish_reason is not None:
        out.append(Finished(index, _REASONS.get(choice.finish_reason, "stop")))
    return out
