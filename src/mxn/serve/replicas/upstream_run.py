"""One request on foreign servers: tried again, continued elsewhere, counted, settled once.

Start at `UpstreamRun.whole` and `UpstreamRun.batches`. Knows bodies of OpenAI's routes as far as
they must be changed on the way; writes no answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec

from mxn.errors import EngineDiedError
from mxn.ledger.types import CloseReason, CountBasis, Ledger, OpenUsage, Settlement, Ticket
from mxn.serve.context import Hop, RequestContext
from mxn.serve.metering import open_row, settle_row
from mxn.serve.openai.errors import ApiError
from mxn.serve.replicas.continuing import is_opening, obstacle, text_of
from mxn.serve.replicas.http_client import Answer, ConnectionLost
from mxn.serve.replicas.sse import Batch, Choice, Chunk, MalformedStream, SseReader, UpstreamUsage
from mxn.serve.replicas.upstream import Upstream, UpstreamSet, error_of, is_retried, lost

log = logging.getLogger("mxn.serve")

_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")
BYTES_PER_TOKEN = 4  # of English text; for reservations where no tokenizer is known
_DEFAULT_OUTPUT_TOKENS = 1024  # reserved where the caller gives no limit


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Head(msgspec.Struct):
    """What a gateway must know of a body; everything else only passes through."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None

    @property
    def limit(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


@dataclass(slots=True, kw_only=True)
class Plan:
    """A request as it came, ready to be sent to any server of the model."""

    id: str
    model: str  # the name the caller used
    path: str
    head: Head
    fields: dict[str, msgspec.Raw]
    body_bytes: int
    context: RequestContext

    @property
    def is_chat(self) -> bool:
        return "messages" in self.fields

    @property
    def input_estimate(self) -> int:
        return self.body_bytes // BYTES_PER_TOKEN + 1

    def body_for(self, upstream: Upstream, rest: dict[str, msgspec.Raw] | None = None) -> bytes:
        """Return the body for a server; `rest`: the fields that ask for the rest of an answer."""
        fields = self.fields | {"model": upstream.model_json}
        if self.head.stream:
            fields["stream_options"] = _WITH_USAGE
        if rest is not None:
            fields |= rest
            if upstream.continues == "field":
                fields["continue_final_message"] = _TRUE
                fields["add_generation_prompt"] = _FALSE
        return msgspec.json.encode(fields)


@dataclass(slots=True)
class Account:
    """The row of a request in the ledger; without a ledger every method does nothing."""

    ledger: Ledger | None
    ticket: Ticket | None = None
    is_settled: bool = False

    async def open(self, plan: Plan, chips: tuple[str, ...]) -> None:
        """Raises: RateLimitError, QuotaError."""
        plan.context.is_stream = bool(plan.head.stream)
        principal = plan.context.principal
        if self.ledger is None or principal is None or not plan.context.is_billed:
            return
        limit = plan.head.limit
        output = _DEFAULT_OUTPUT_TOKENS if limit is None else limit
        usage = OpenUsage(
            usage_id=plan.context.usage_id or plan.id,
            request_id=plan.context.request_id,
            principal=principal,
            endpoint=plan.path,
            model=plan.model,
            chips=chips,
            input_tokens=plan.input_estimate,
            max_output_tokens=output * (plan.head.n or 1) if _makes_tokens(plan) else 0,
            is_stream=bool(plan.head.stream),
            batch_id=plan.context.batch_id,
        )
        self.ticket = await open_row(plan.context, self.ledger, usage)

    def progress(self, hop: Hop, input_tokens: int, output_tokens: int) -> None:
        if self.ticket is not None and self.ledger is not None:
            self.ledger.progress(
                self.ticket, input_tokens, output_tokens, chip=hop.chip, replica=hop.replica
            )

    async def settle(self, context: RequestContext, used: Settlement) -> None:
        """The first call counts, also without a ledger."""
        if self.is_settled:
            return
        self.is_settled = True
        ticket, self.ticket = self.ticket, None
        await settle_row(context, self.ledger, ticket, used)


def _makes_tokens(plan: Plan) -> bool:
    return not plan.path.endswith("/embeddings")


@dataclass(slots=True)
class UpstreamRun:
    """One request under way."""

    plan: Plan
    upstreams: UpstreamSet
    account: Account
    usage: UpstreamUsage | None = None
    num_events: int = 0  # from the first one with a piece of the answer on
    is_over: bool = False  # the last batch is out
    upstream: Upstream | None = None
    num_replicas: int = 0
    _tried: list[Upstream] = field(default_factory=list)
    _sent: list[Choice] = field(default_factory=list)  # kept while the answer could be continued
    _finished: set[int] = field(default_factory=set)  # choices that have their finish reason
    _resumed_events: int = 0
    is_closing: bool = False  # the row is being settled: too late to cancel

    async def whole(self) -> bytes:
        """Return the body of a complete answer. Raises: ApiError, MxnError."""
        while True:
            upstream = self._next()
            started_s = time.perf_counter()
            try:
                answer, body = await self._fetch(upstream)
            except ConnectionLost as exc:
                self._give_up(upstream, lost(upstream, exc))
                continue
            finally:
                upstream.num_running -= 1
                self.plan.context.upstream_s += time.perf_counter() - started_s
            if answer.status == 200:
                upstream.succeeded()
                return body
            self._refused(upstream, answer, body)

    async def _fetch(self, upstream: Upstream) -> tuple[Answer, bytes]:
        return await upstream.http.fetch("POST", self.plan.path, self.plan.body_for(upstream))

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Yield the events of a stream; `is_over` is set before the last batch comes out.

        Raises: ApiError, MxnError; mid-stream only where no server could go on.
        """
        answer = await self._open(None)
        try:
            while True:
                upstream = self.upstream
                assert upstream is not None
                try:
                    async for batch in self._read(answer, upstream):
                        yield batch
                    return
                except (ConnectionLost, MalformedStream) as exc:
                    answer.close()
                    upstream.failed()
                    last = self._last_after(exc)
                    if last is not None:
                        self.is_over = True
                        yield last
                        return
                    rest = self._rest(upstream, exc) if self.num_events else None
                    self.upstream = None
                    upstream.num_running -= 1
                    answer = await self._open(rest)
        finally:
            answer.close()
            if self.upstream is not None:
                self.upstream.num_running -= 1

    async def _read(self, answer: Answer, upstream: Upstream) -> AsyncGenerator[Batch, None]:
        """Yield what one server sends. Raises: ConnectionLost, MalformedStream."""
        reader = SseReader()
        while True:
            data = await answer.next()
            batch = reader.feed(data) if data else reader.finish()
            self._note(batch)
            if batch.problem is not None:
                if batch.chunks:
                    yield batch
                raise MalformedStream(f"{upstream.name} {batch.problem}")
            is_complete = self._is_complete
            if batch.is_done or (not data and is_complete):
                if not is_complete and not batch.chunks and not self.num_events:
                    raise MalformedStream("an empty stream")
                upstream.succeeded()
                self.is_over = True
                yield batch
                return
            if not data:
                raise MalformedStream("the stream ended before its answer")
            if batch.chunks:
                yield batch

    async def _open(self, rest: dict[str, msgspec.Raw] | None) -> Answer:
        """Return a stream that has begun, on the first server that takes the request."""
        while True:
            upstream = self._next(must_continue=rest is not None)
            self.upstream = None
            data = self.plan.body_for(upstream, rest)
            try:
                answer = await upstream.http.open("POST", self.plan.path, data)
                if answer.status == 200:
                    self.upstream = upstream
                    return answer
                refusal = await answer.read()
            except ConnectionLost as exc:
                self._give_up(upstream, lost(upstream, exc))
                continue
            finally:
                if self.upstream is None:
                    upstream.num_running -= 1
            self._refused(upstream, answer, refusal)

    def _next(self, *, must_continue: bool = False) -> Upstream:
        upstream = self.upstreams.choose(self._tried)
        while upstream is not None and must_continue and upstream.continues == "no":
            self._tried.append(upstream)
            upstream = self.upstreams.choose(self._tried)
        if upstream is None:
            raise EngineDiedError("no server of this model could finish it", retry_after_s=1.0)
        self._tried.append(upstream)
        upstream.num_running += 1
        self.num_replicas += 1
        hop = Hop(replica=upstream.name, chip=upstream.config.chip)
        hop.resumed_tokens = self._resumed_events
        hop.is_takeover = self.num_replicas > 1
        self.plan.context.hops.append(hop)
        return upstream

    def _give_up(self, upstream: Upstream, error: Exception) -> None:
        """Note a server's failure; raise it when there is no other to ask."""
        upstream.failed()
        if self.upstreams.choose(self._tried) is None:
            raise error

    def _refused(self, upstream: Upstream, answer: Answer, body: bytes) -> None:
        error = error_of(upstream, answer, body)
        if not is_retried(answer.status):
            raise error
        self._give_up(upstream, error)

    def _note(self, batch: Batch) -> None:
        """Count what a batch holds."""
        keeps = self._may_continue
        has_begun = self.num_events > 0
        for chunk in batch.chunks:
            if chunk.usage is not None:
                self.usage = chunk.usage
            for choice in chunk.choices:
                is_last = choice.finish_reason is not None
                if is_last:
                    self._finished.add(choice.index)
                if (self.num_events and not is_last) or not is_opening(choice):
                    self.num_events += 1
                if keeps:
                    self._sent.append(choice)
        traffic = self.plan.context.traffic
        if not has_begun and self.num_events and traffic is not None:
            traffic.began(self.plan.context)
        if batch.chunks and not self.plan.context.is_batch:
            input_tokens, output_tokens, _ = self.counts()
            hop = self.plan.context.hops[-1]
            self.account.progress(hop, input_tokens, max(self.num_events, output_tokens))

    @property
    def _may_continue(self) -> bool:
        return self.plan.is_chat and (self.plan.head.n or 1) == 1 and len(self.upstreams.all) > 1

    @property
    def _is_complete(self) -> bool:
        return len(self._finished) >= (self.plan.head.n or 1)

    def _last_after(self, exc: Exception) -> Batch | None:
        """Return the last batch of an answer whose server was lost when nothing more was due."""
        if self._is_complete:  # only counts and the end mark are missing
            log.info("%s; the answer was whole", exc)
            return Batch([], [], True)
        limit = self.plan.head.limit
        if self._may_continue and limit is not None and 0 < limit <= self.num_events:
            return self._ended_at_limit()
        return None

    def _rest(self, upstream: Upstream, exc: Exception) -> dict[str, msgspec.Raw]:
        """Return the fields that ask another server for the rest of the answer.

        Raises: EngineDiedError when the answer cannot be continued.
        """
        text = text_of(self._sent) if self._may_continue and not self._finished else None
        why = "it is more than one text" if text is None else obstacle(self.plan.fields, text)
        if text is None or why is not None:
            raise EngineDiedError(
                f"{upstream.name} was lost in mid-answer: {exc}",
                hint=f"no other server can go on with it ({why}); send it again",
                retry_after_s=1.0,
            )
        self._resumed_events = self.num_events
        rest: dict[str, msgspec.Raw] = {}
        limit = self.plan.head.limit
        if limit is not None:
            name = "max_tokens" if self.plan.head.max_completion_tokens is None else (
                "max_completion_tokens"
            )  # fmt: skip
            rest[name] = msgspec.Raw(b"%d" % (limit - self.num_events))
        messages = msgspec.json.decode(self.plan.fields["messages"], type=list[msgspec.Raw])
        said = msgspec.json.encode({"role": "assistant", "content": text})
        rest["messages"] = msgspec.Raw(msgspec.json.encode([*messages, msgspec.Raw(said)]))
        return rest

    def _ended_at_limit(self) -> Batch:
        value = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
        data = {"object": "chat.completion.chunk", "created": int(time.time()), "choices": [value]}
        chunk = Chunk(choices=[Choice(finish_reason="length")])
        return Batch([b"data: " + msgspec.json.encode(data)], [chunk], True)

    def counts(self) -> tuple[int, int, CountBasis]:
        """Return input tokens, output tokens, and where they come from."""
        usage = self.usage
        if usage is None or usage.prompt_tokens is None:
            return self.plan.input_estimate, self.num_events, "events"
        if not self._resumed_events:
            return usage.prompt_tokens, usage.completion_tokens or 0, "server"
        prompt = max(0, usage.prompt_tokens - self._resumed_events)
        return prompt, self._resumed_events + (usage.completion_tokens or 0), "events"

    async def settle(self, reason: CloseReason, status: int = 200) -> None:
        """Close the row in the ledger; a second call does nothing."""
        self.is_closing = True
        if self.account.is_settled:
            return
        hops = self.plan.context.hops
        usage = self.usage
        if reason in ("complete", "client_gone", "replica_lost", "timeout") or self.num_events:
            input_tokens, output_tokens, basis = self.counts()
        else:
            input_tokens, output_tokens, basis = 0, 0, "events"
        if reason == "client_gone" and not self.num_events:
            input_tokens = 0 if usage is None else input_tokens
        await self.account.settle(
            self.plan.context,
            Settlement(
                reason=reason,
                chip=hops[-1].chip if hops else "",
                replica=hops[-1].replica if hops else "",
                input_tokens=input_tokens,
                cached_tokens=min(usage.cached_tokens, input_tokens) if usage else 0,
                output_tokens=output_tokens,
                reasoning_tokens=min(usage.reasoning_tokens, output_tokens) if usage else 0,
                basis=basis,
                num_replicas=max(1, self.num_replicas),
                status=status,
            ),
        )


def status_of(error: BaseException) -> int:
    return error.status if isinstance(error, ApiError) else 503
