"""Drives replicas for chat and completions: prompts and sampling in, deltas and usage out.

Knows both request types' common part and the replica contract; knows no JSON shapes of answers.
Start at `Job.create` and `Job.run`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from mxn.engine.protocol import Delta, EngineClient, Generate, ModelInfo, SamplingParams
from mxn.errors import EngineDiedError
from mxn.ledger.types import CloseReason
from mxn.serve.context import RequestContext, current
from mxn.serve.deadlines import in_time
from mxn.serve.metering import Meter, reason_of
from mxn.serve.metrics import ModelMetrics, Trace
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.interleave import merge
from mxn.serve.openai.types import CompletionTokensDetails, PromptTokensDetails, Usage
from mxn.serve.served import ServedModel

BATCH_PRIORITY = 10  # behind everyone who waits for an answer
MAX_SEQUENCES = 1024  # prompts × n in one request
_SEED_MASK = 2**63 - 1


@dataclass(slots=True, kw_only=True)
class Job:
    """One HTTP request as engine requests: prompt-major, so index = prompt × n + choice."""

    model: ServedModel
    id: str
    requests: list[Generate]
    traces: list[Trace]
    num_choices: int
    is_stream: bool = False
    # Called with each delta before it is passed on; returns the reasoning tokens of its choice so
    # far. The row is settled before the last delta comes out, so reading later would be too late.
    read: Callable[[int, Delta], int] | None = None
    device_s: float = 0.0
    _reasoning: list[int] = field(init=False)  # tokens of thoughts of each sequence
    _left: list[int] = field(init=False)  # tokens of each sequence that have left

    def __post_init__(self) -> None:
        self._reasoning = [0] * len(self.requests)
        self._left = [0] * len(self.requests)

    @classmethod
    def create(
        cls,
        model: ServedModel,
        metrics: ModelMetrics,
        *,
        job_id: str,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        num_choices: int,
        is_stream: bool = False,
    ) -> Job:
        """Plan `num_choices` engine requests for each prompt, seeded seed, seed + 1, …"""
        total = len(prompts) * num_choices
        if total > MAX_SEQUENCES:
            raise ApiError(
                f"At most {MAX_SEQUENCES} sequences in one request, got {total} "
                f"({len(prompts)} prompts x {num_choices} choices).",
                param="n" if num_choices > 1 else "prompt",
            )
        params = [_reseeded(sampling, choice) for choice in range(num_choices)]
        priority = priority_of(current())
        requests = [
            Generate(
                request_id=job_id if total == 1 else f"{job_id}-{index}",
                prompt_ids=prompts[index // num_choices],
                sampling=params[index % num_choices],
                priority=priority,
                adapter=model.adapter,
            )
            for index in range(total)
        ]
        traces = [Trace(metrics) for _ in requests]
        return cls(
            model=model, id=job_id, requests=requests, traces=traces, num_choices=num_choices,
            is_stream=is_stream,
        )  # fmt: skip

    async def run(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (index, delta) as replicas produce them; closing it cancels everything at once.

        The usage row is open before the first and settled before the last one comes out.
        Raises: EngineDiedError when the replica died or gave the request up, DeadlineError,
        RateLimitError, QuotaError, UserError.
        """
        outcome = "client_gone"
        meter = await self._open()
        num_open = len(self.requests)
        try:
            async with aclosing(merge(self.model.client, self.requests)) as deltas:
                async for index, delta in _in_time(deltas):
                    self.traces[index].on_delta(delta)
                    if self.read is not None:
                        self._reasoning[index] = self.read(index, delta)
                    if delta.finish_reason is not None:
                        if delta.finish_reason == "cancelled":
                            raise EngineDiedError("the replica cancelled the request")
                        self.device_s += delta.device_s
                        num_open -= 1
                        if not num_open:
                            self._left = [trace.completion_tokens for trace in self.traces]
                            await self._settle(meter, "complete", 200)
                    yield index, delta
                    if not self.is_stream:  # it leaves in one piece, or not at all
                        continue
                    self._left[index] = self.traces[index].completion_tokens
                    if meter.is_due():
                        meter.progress(*self._counts())
        except BaseException as exc:
            outcome = "error" if isinstance(exc, Exception) else outcome
            await self._settle(meter, *reason_of(exc))
            raise
        finally:
            for trace in self.traces:
                trace.close(outcome)

    async def _open(self) -> Meter:
        model, info = self.model, self.model.info
        prompts = self.requests[:: self.num_choices]
        most = sum(_most_tokens(request, info) for request in self.requests)
        return await Meter.open(
            self.id,
            model=model.name,
            base=model.parent or "",
            chips=chips_of(model.client),
            input_tokens=sum(len(request.prompt_ids) for request in prompts),
            max_output_tokens=most,
            is_stream=self.is_stream,
        )

    async def _settle(self, meter: Meter, reason: CloseReason, status: int) -> None:
        if not meter.is_open:
            return
        prompt, output = self._counts()
        _, cached = self._prompts()
        await meter.settle(
            reason,
            input_tokens=prompt,
            cached_tokens=cached,
            output_tokens=output,
            reasoning_tokens=min(sum(self._reasoning), output),
            device_us=round(1e6 * self.device_s),
            basis=getattr(self.model.client, "count_basis", "engine"),
            status=status,
        )

    def _counts(self) -> tuple[int, int]:
        """Return the prompt tokens that were computed and the output tokens that have left."""
        prompt, _ = self._prompts()
        return prompt, sum(self._left)

    def _prompts(self) -> tuple[int, int]:
        """Return prompt tokens and how many of them were cached.

        A prompt counts once, however many choices it has: as the first of them had it that began.
        """
        total = cached = 0
        for start in range(0, len(self.traces), self.num_choices):
            for trace in self.traces[start : start + self.num_choices]:
                if trace.prompt_tokens:
                    total += trace.prompt_tokens
                    cached += trace.cached_tokens
                    break
        return total, cached

    def usage(self) -> Usage:
        """Return the counts so far; a prompt counts once, however many choices it has."""
        prompt, cached = self._prompts()
        completion = sum(trace.completion_tokens for trace in self.traces)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=min(sum(self._reasoning), completion)
            ),
        )


def priority_of(context: RequestContext) -> int:
    """Return who goes first among requests that wait: smaller is sooner."""
    own = context.principal.priority if context.principal else 0
    return own + (BATCH_PRIORITY if context.is_batch else 0)


def chips_of(client: EngineClient) -> Sequence[str]:
    """Return the chips that may serve a request: of a pool all of them."""
    chips = getattr(client, "chips", None)
    return chips() if chips is not None else (client.info.chip,)


def _most_tokens(request: Generate, info: ModelInfo) -> int:
    room = max(0, info.max_context - len(request.prompt_ids))
    limit = request.sampling.max_tokens
    return room if limit is None else min(limit, room)


async def _in_time(
    deltas: AsyncGenerator[tuple[int, Delta], None],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Pass deltas on until the request's deadline. Raises: DeadlineError."""
    deadline_s = current().deadline_s
    if deadline_s is None:
        async for item in deltas:
            yield item
        return
    while True:
        item = await in_time(anext(deltas, None), deadline_s)
        if item is None:
            return
        yield item


def _reseeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    if sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) & _SEED_MASK)
