"""One chat request on our own replicas: from a checked body to events of its answer.

Knows sampling, prompts and parsers of answers; knows no protocol's JSON. Start at `start_chat`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, ParamSpec, TypeVar

import msgspec

from mxn.engine.protocol import Delta, Grammar, SamplingParams
from mxn.serve.chat.choice import ChoiceReader, Reading
from mxn.serve.chat.dialect import Dialect, dialect_of
from mxn.serve.chat.events import ChatEvent, ChatRun, Finished, Text
from mxn.serve.chat.form import answer_form
from mxn.serve.chat.plan import (
    Thought,
    ToolPlan,
    constraint,
    may_constrain,
    plan_tools,
)
from mxn.serve.chat.prompt import render_aside
from mxn.serve.chat.reasoning import Begins, how_it_begins
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.generation import Job
from mxn.serve.openai.prompt_checks import check_length, check_prompt
from mxn.serve.openai.sampling import build_sampling
from mxn.serve.openai.types import ChatRequest, Usage
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id, require_kind

P = ParamSpec("P")
T = TypeVar("T")


async def start_chat(
    state: State, body: ChatRequest, model: ServedModel, *, job_id: str | None = None
) -> ChatRun:
    """Check a request, make its prompt, and return the run; nothing is generated before `events`.

    Raises: ApiError with `param`, UserError.
    """
    require_kind(model, "decoder")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    dialect = _dialect(state, model)
    call = _caller(body)
    tools, form = await call(_plan, body)
    prompt = await render_aside(body, model, dialect, tools.definitions())
    max_tokens = _max_tokens(body, is_lenient=state.settings.is_lenient)
    check_length(prompt, model, "messages")
    prompt_ids = await model.encode(prompt, bool(body.add_special_tokens))
    check_prompt(prompt_ids, model.info, max_tokens=max_tokens, param="messages")
    continues = bool(body.continue_final_message)
    begins = how_it_begins(prompt, dialect.reasoning, continues=continues)
    reading = _reading(body, model, dialect, tools, begins)
    sampling = await call(_sampling, body, model, max_tokens, reading, form)
    run_id = job_id or new_id("chatcmpl")
    job = Job.create(
        model,
        state.metrics.model(model.name),
        job_id=run_id,
        prompts=[prompt_ids],
        sampling=sampling,
        num_choices=body.n or 1,
        is_stream=bool(body.stream),
    )
    return NativeRun(run_id, model, job, reading)


def _plan(body: ChatRequest) -> tuple[ToolPlan, Grammar | None]:
    return plan_tools(body), answer_form(body)


def _caller(body: ChatRequest) -> Callable[..., Awaitable[Any]]:
    """Return what calls a function that may check grammars: a large one takes a tenth of a second,
    so a thread does it."""
    return asyncio.to_thread if may_constrain(body) else _call


async def _call(function: Callable[P, T], /, *rest: P.args, **named: P.kwargs) -> T:
    return function(*rest, **named)


async def count_prompt_tokens(state: State, body: ChatRequest, model: ServedModel) -> int:
    """Return how many tokens the prompt of a chat has. Raises: ApiError, UserError."""
    require_kind(model, "decoder")
    tools = await _caller(body)(plan_tools, body)
    prompt = await render_aside(body, model, _dialect(state, model), tools.definitions())
    return len(await model.encode(prompt, bool(body.add_special_tokens)))


def _dialect(state: State, model: ServedModel) -> Dialect:
    settings = state.settings
    return dialect_of(model, settings.tool_parser, settings.reasoning_parser)


def _reading(
    body: ChatRequest, model: ServedModel, dialect: Dialect, tools: ToolPlan, begins: Begins
) -> Reading:
    marks = dialect.tools.markers() if tools.parses else ()
    if dialect.reasoning is not None and begins != "never":
        marks = (*marks, dialect.reasoning.opens, dialect.reasoning.closes)
    return Reading(
        dialect=dialect,
        tools=tools,
        begins=begins,
        cleans=body.skip_special_tokens is not False and dialect.hides(*marks),
        shows_reasoning=body.include_reasoning is not False,
        tokenizer=model.tokenizer,
    )


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


def _sampling(
    body: ChatRequest,
    model: ServedModel,
    max_tokens: int | None,
    reading: Reading,
    form: Grammar | None,
) -> SamplingParams:
    sampling = build_sampling(
        body,
        model.defaults,
        model.info,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    thought = Thought(tags=reading.dialect.reasoning, begins=reading.begins)
    token_of = model.tokenizer.added_id
    grammar = constraint(reading.tools, form, reading.dialect.tools, thought, token_of)
    if grammar is None and not reading.cleans:
        return sampling
    return msgspec.structs.replace(
        sampling,
        grammar=grammar,
        # Marks that are special tokens must be in the text; the others are taken out here.
        skip_special_tokens=sampling.skip_special_tokens and not reading.cleans,
    )


class NativeRun:
    """A `ChatRun` on our own replicas."""

    def __init__(self, run_id: str, model: ServedModel, job: Job, reading: Reading) -> None:
        self.id = run_id
        self.model = model.name
        self.created = int(time.time())
        self._job = job
        self._reading = reading

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        """Yield what happens; the last `Finished` comes when the job is over and settled.

        A choice begins with its first tokens, by an empty `Text` if they have no text yet.
        """
        job, reading = self._job, self._reading
        readers = [ChoiceReader(index, reading) for index in range(len(job.requests))]
        waiting = set(range(len(readers)))  # choices of which nothing was seen yet
        num_open = len(readers)
        last: Finished | None = None
        is_plain = reading.is_plain
        made: list[ChatEvent] = []

        def read(index: int, delta: Delta) -> int:
            """Read a delta as soon as it is there: its thoughts are in the row that is settled."""
            nonlocal made
            made = readers[index].read(delta)
            return readers[index].reasoning_tokens

        if not is_plain:
            job.read = read
        async with aclosing(job.run()) as deltas:
            async for index, delta in deltas:
                if is_plain and delta.finish_reason is None:
                    # The hot path: the text of a delta is the text of the answer.
                    if delta.text or delta.logprobs or index in waiting:
                        waiting.discard(index)
                        yield Text(index, delta.text, delta.logprobs)
                    continue
                if is_plain:
                    read(index, delta)
                if not made and index in waiting:
                    made.append(Text(index, ""))
                waiting.discard(index)
                for item in made:
                    if isinstance(item, Finished):
                        num_open -= 1
                        if not num_open:
                            last = item
                            break
                    yield item
        if last is not None:
            yield last

    def usage(self) -> Usage:
        return self._job.usage()
