"""One request on foreign servers: tried again, continued elsewhere, counted, settled once.

Start at `UpstreamRun.whole` and `UpstreamRun.batches`. What is asked is a `Plan`, what is counted a
`Counter`; writes no answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import msgspec

from mxn.errors import DeadlineError, EngineDiedError
from mxn.ledger.types import CloseReason, Settlement
from mxn.serve.context import Hop
from mxn.serve.deadlines import in_time
from mxn.serve.openai.errors import ApiError
from mxn.serve.replicas.continuing import is_opening, obstacle, text_of
from mxn.serve.replicas.counting import Counter, Counts, estimate, usage_in
from mxn.serve.replicas.http_client import Answer, ConnectionLost
from mxn.serve.replicas.sse import Batch, Choice, Chunk, MalformedStream, SseReader
from mxn.serve.replicas.upstream import (
    Upstream,
    UpstreamSet,
    bad_answer,
    error_of,
    is_retried,
    lost,
    reported_in,
)
from mxn.serve.replicas.upstream_plan import Account, Plan

log = logging.getLogger("mxn.serve")


@dataclass(slots=True)
class UpstreamRun:
    """One request under way."""

    plan: Plan
    upstreams: UpstreamSet
    account: Account
    counter: Counter = field(init=False)
    is_over: bool = False  # the last batch is out
    upstream: Upstream | None = None
    num_replicas: int = 0
    _tried: list[Upstream] = field(default_factory=list)
    _sent: list[Choice] = field(default_factory=list)  # kept while the answer could be continued
    _finished: set[int] = field(default_factory=set)  # choices that have their finish reason
    _num_resumed: int = 0  # tokens that earlier servers made
    is_closing: bool = False  # the row is being settled: too late to cancel

    def __post_init__(self) -> None:
        self.counter = Counter(
            input_estimate=self.plan.input_estimate, makes_tokens=self.plan.makes_tokens
        )

    async def begin(self) -> None:
        """Open the row in the ledger. Raises: RateLimitError, QuotaError."""
        await self.account.open(self.plan)

    async def whole(self) -> dict[str, msgspec.Raw]:
        """Return the fields of a complete answer, counted. Raises: ApiError, MxnError."""
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
            if answer.status != 200:
                self._refused(upstream, answer, body)
                continue
            try:
                fields = self._taken(upstream, body)
            except ApiError as error:
                self._give_up(upstream, error)
                continue
            upstream.succeeded()
            self.is_over = True
            return fields

    def _taken(self, upstream: Upstream, body: bytes) -> dict[str, msgspec.Raw]:
        """Return the fields of a whole answer after counting it. Raises: ApiError if it is none."""
        try:
            fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            num_tokens = estimate(fields)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise bad_answer(f"The server of this model sent no JSON: {exc}") from None
        error = reported_in(upstream, fields)
        if error is not None:
            raise error
        self.counter.num_events = num_tokens
        usage = usage_in(fields)
        if usage is not None:
            self.counter.hear(usage)
        return fields

    async def _fetch(self, upstream: Upstream) -> tuple[Answer, bytes]:
        work = upstream.http.fetch("POST", self.plan.path, self.plan.body_for(upstream))
        return await in_time(work, self.plan.context.deadline_s)

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
                    rest = self._rest(upstream, exc) if self.counter.num_events else None
                    self.counter.move()
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
        deadline_s = self.plan.context.deadline_s
        while True:
            if deadline_s is None:
                data = await answer.next()
            else:
                data = await in_time(answer.next(), deadline_s)
            batch = reader.feed(data) if data else reader.finish()
            self._note(batch)
            if batch.problem is not None:
                if batch.chunks:
                    yield batch
                raise MalformedStream(f"{upstream.name} {batch.problem}")
            is_complete = self._is_complete
            if batch.is_done or (not data and is_complete):
                if not is_complete and not batch.chunks and not self.counter.num_events:
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
                work = upstream.http.open("POST", self.plan.path, data)
                answer = await in_time(work, self.plan.context.deadline_s)
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
        hop.resumed_tokens = self._num_resumed
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
        counter = self.counter
        has_begun = counter.num_events > 0
        for chunk in batch.chunks:
            if chunk.usage is not None:
                counter.hear(chunk.usage)
            for choice in chunk.choices:
                is_last = choice.finish_reason is not None
                if is_last:
                    self._finished.add(choice.index)
                if (counter.num_events and not is_last) or not is_opening(choice):
                    counter.num_events += 1
                if keeps:
                    self._sent.append(choice)
        traffic = self.plan.context.traffic
        if not has_begun and counter.num_events and traffic is not None:
            traffic.began(self.plan.context)
        if batch.chunks and not self.plan.context.is_batch:
            so_far = counter.counts(is_complete=False)
            output_tokens = so_far.output if self.plan.is_streamed else 0
            self.account.progress(self.plan.context.hops[-1], so_far.input, output_tokens)

    @property
    def _may_continue(self) -> bool:
        return self.plan.is_chat and self.plan.num_choices == 1 and len(self.upstreams.all) > 1

    @property
    def _is_complete(self) -> bool:
        return len(self._finished) >= self.plan.num_choices

    def _last_after(self, exc: Exception) -> Batch | None:
        """Return the last batch of an answer whose server was lost when nothing more was due."""
        if self._is_complete:  # only counts and the end mark are missing
            log.info("%s; the answer was whole", exc)
            return Batch([], [], True)
        limit = self.plan.limit
        if self._may_continue and limit is not None and 0 < limit <= self.counter.num_events:
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
        self._num_resumed = self.counter.num_events
        rest = self.plan.limits_after(self._num_resumed)
        messages = msgspec.json.decode(self.plan.fields["messages"], type=list[msgspec.Raw])
        said = msgspec.json.encode({"role": "assistant", "content": text})
        rest["messages"] = msgspec.Raw(msgspec.json.encode([*messages, msgspec.Raw(said)]))
        return rest

    def _ended_at_limit(self) -> Batch:
        value = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
        data = {"object": "chat.completion.chunk", "created": int(time.time()), "choices": [value]}
        chunk = Chunk(choices=[Choice(finish_reason="length")])
        return Batch([b"data: " + msgspec.json.encode(data)], [chunk], True)

    def counts(self) -> Counts:
        return self.counter.counts(is_complete=self.is_over)

    async def settle(self, reason: CloseReason, status: int = 200) -> None:
        """Close the row in the ledger; a second call does nothing."""
        self.is_closing = True
        if self.account.is_settled:
            return
        hops = self.plan.context.hops
        used = self._used(reason)
        await self.account.settle(
            self.plan.context,
            Settlement(
                reason=reason,
                chip=hops[-1].chip if hops else "",
                replica=hops[-1].replica if hops else "",
                input_tokens=used.input,
                cached_tokens=used.cached,
                output_tokens=used.output,
                reasoning_tokens=used.reasoning,
                basis=used.basis,
                num_replicas=max(1, self.num_replicas),
                status=status,
            ),
        )

    def _used(self, reason: CloseReason) -> Counts:
        """Return what is settled. An answer that leaves in one piece is paid for as a whole."""
        counter, plan = self.counter, self.plan
        counts = counter.counts(is_complete=reason == "complete")
        if reason == "complete":
            return counts
        if not counter.num_events and (reason == "error" or counter.told is None):
            return Counts(0 if reason in ("error", "client_gone") else counts.input)
        if plan.context.is_batch or not plan.is_streamed:
            return replace(counts, output=0, reasoning=0)
        return counts


def status_of(error: BaseException) -> int:
    if isinstance(error, DeadlineError):
        return 408
    return error.status if isinstance(error, ApiError) else 503
