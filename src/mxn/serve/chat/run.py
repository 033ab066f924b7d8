"""One chat request on our own replicas: from a checked body to events of its answer.

Knows sampling, prompts and parsers of answers; knows no protocol's JSON. Start at `start_chat`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from mxn.engine.protocol import SamplingParams
from mxn.serve.chat.events import ChatEvent, ChatRun, Finished, Text
from mxn.serve.chat.prompt import render_aside
from mxn.serve.openai.errors import ApiError, not_supported
from mxn.serve.openai.generation import Job, build_sampling, check_prompt
from mxn.serve.openai.types import ChatRequest, Usage
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id, require_kind


async def start_chat(
    state: State, body: ChatRequest, model: ServedModel, *, job_id: str | None = None
) -> ChatRun:
    """Check a request, make its prompt, and return the run; nothing is generated before `events`.

    Raises: ApiError with `param`, UserError.
    """
    require_kind(model, "decoder")
    _refuse_unsupported(body)
    prompt_ids = await _prompt_ids(body, model)
    max_tokens = _max_tokens(body, is_lenient=state.settings.is_lenient)
    check_prompt(prompt_ids, model.info, max_tokens=max_tokens, param="messages")
    run_id = job_id or new_id("chatcmpl")
    job = Job.create(
        model,
        state.metrics.model(model.name),
        job_id=run_id,
        prompts=[prompt_ids],
        sampling=_sampling(body, model, max_tokens),
        num_choices=body.n or 1,
    )
    return NativeRun(run_id, model, job)


async def count_prompt_tokens(state: State, body: ChatRequest, model: ServedModel) -> int:
    """Return how many tokens the prompt of a chat has. Raises: ApiError, UserError."""
    require_kind(model, "decoder")
    return len(await _prompt_ids(body, model))


async def _prompt_ids(body: ChatRequest, model: ServedModel) -> list[int]:
    text = await render_aside(body, model)
    return await model.encode(text, bool(body.add_special_tokens))


def _refuse_unsupported(body: ChatRequest) -> None:
    """Refuse what would change the answer and is not there; ignoring it would be a lie."""
    if body.response_format is not None and body.response_format.type != "text":
        raise not_supported("response_format", f"response_format {body.response_format.type!r}")
    if body.tools and body.tool_choice != "none":
        raise not_supported("tools", "Calling tools")
    if body.functions and body.function_call != "none":
        raise not_supported("functions", "Calling functions")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")


def _max_tokens(body: ChatRequest, *, is_lenient: bool) -> int | None:
    """Return the limit; the newer field wins when both are sent."""
    newer = body.max_completion_tokens is not None
    value = body.max_completion_tokens if newer else body.max_tokens
    if value == 0:
        if is_lenient:
            return None
        param = "max_completion_tokens" if newer else "max_tokens"
        raise ApiError(f"{param} is at least 1, got 0.", param=param)
    return value


def _sampling(body: ChatRequest, model: ServedModel, max_tokens: int | None) -> SamplingParams:
    return build_sampling(
        body,
        model.defaults,
        model.info,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


class NativeRun:
    """A `ChatRun` on our own replicas."""

    def __init__(self, run_id: str, model: ServedModel, job: Job) -> None:
        self.id = run_id
        self.model = model.name
        self.created = int(time.time())
        self._job = job

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        """Yield what happens; the last `Finished` comes when the job is over and settled."""
        num_open = len(self._job.requests)
        last: Finished | None = None
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                if delta.text or delta.logprobs:
                    yield Text(index, delta.text, delta.logprobs)
                if delta.finish_reason is None:
                    continue
                reason = "length" if delta.finish_reason == "length" else "stop"
                last = Finished(index, reason, delta.stop_reason)
                num_open -= 1
                if num_open:
                    yield last
        if last is not None:
            yield last

    def usage(self) -> Usage:
        return self._job.usage()
