"""POST /v1/completions: text or token ids in, with echo, logprobs, n and best_of.

The answer of a prompt begins with the prompt itself when `echo` is set; with `max_tokens` 0 it is
only the prompt, which is how log-likelihoods are asked for. Start at `CompletionRoutes.create`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.engine.protocol import Delta, SamplingParams, TokenLogprob
from mxn.serve.http import json_response, unless_gone
from mxn.serve.openai.errors import ApiError, not_supported
from mxn.serve.openai.generation import Job
from mxn.serve.openai.logprobs import CompletionLogprobsBuilder
from mxn.serve.openai.prompt_checks import check_length, check_prompt
from mxn.serve.openai.sampling import build_sampling
from mxn.serve.openai.stream import EventStream, event
from mxn.serve.openai.types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id, require_kind, token_prompts

DEFAULT_MAX_TOKENS = 16  # OpenAI's default of this route, unlike chat's "until the end"


class CompletionRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def create(self, request: Request) -> Response:
        body, model = await self._state.read(request, CompletionRequest)
        require_kind(model, "decoder")
        _check(body, is_lenient=self._state.settings.is_lenient)
        prompts = await self._prompts(body, model)
        job_id = new_id("cmpl")
        num_choices = max(body.n or 1, body.best_of or 1)
        job = Job.create(
            model,
            self._state.metrics.model(model.name),
            job_id=job_id,
            prompts=[prompt.ids for prompt in prompts],
            sampling=self._sampling(body, model),
            num_choices=num_choices,
            is_stream=bool(body.stream),
        )
        answer = _Answer(job_id, model, job, body, prompts)
        if not body.stream:
            completion = await unless_gone(request, answer.whole())
            return json_response(completion, model.headers)
        return EventStream(
            answer.events(),
            headers=model.headers,
            heartbeat_s=self._state.settings.heartbeat_s,
        )

    async def _prompts(self, body: CompletionRequest, model: ServedModel) -> list[_Prompt]:
        limit = self._state.settings.max_inputs
        prompts = []
        for value in token_prompts(body.prompt, "prompt", limit):
            is_text = isinstance(value, str)
            # A replica keeps room for one token also where only the prompt is scored.
            wanted = max(1, self._max_tokens(body))
            if is_text:
                check_length(value, model, "prompt")
            ids = (
                await model.encode(value, body.add_special_tokens is not False)
                if is_text
                else value
            )
            check_prompt(ids, model.info, max_tokens=wanted, param="prompt")
            text = ""
            if body.echo:
                text = value if is_text else model.tokenizer.decode(ids, not _shows_special(body))
            prompts.append(_Prompt(ids, text))
        return prompts

    def _max_tokens(self, body: CompletionRequest) -> int:
        if body.max_tokens is None or (body.max_tokens == 0 and self._state.settings.is_lenient):
            return max(DEFAULT_MAX_TOKENS, body.min_tokens or 0)
        return body.max_tokens

    def _sampling(self, body: CompletionRequest, model: ServedModel) -> SamplingParams:
        # Ranking by best_of needs the chosen tokens' values, also when the client does not.
        ranks = (body.best_of or 1) > (body.n or 1)
        return build_sampling(
            body,
            model.defaults,
            model.info,
            max_tokens=self._max_tokens(body),
            logprobs=0 if ranks and body.logprobs is None else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )


class _Prompt(msgspec.Struct, frozen=True):
    ids: list[int]
    text: str  # what echo puts in front of the answer


def _shows_special(body: CompletionRequest) -> bool:
    return body.skip_special_tokens is False


def _check(body: CompletionRequest, *, is_lenient: bool) -> None:
    if body.suffix:
        raise not_supported("suffix", "suffix (filling in the middle)")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise ApiError(
            f"best_of {body.best_of} is below n {body.n}.",
            param="best_of",
        )
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise ApiError("best_of above n cannot be streamed.", param="best_of")
    if body.max_tokens == 0 and not body.echo and not is_lenient:
        raise ApiError("max_tokens 0 makes sense only with echo.", param="max_tokens")


class _Choice:
    """One sequence under way; turns its deltas into pieces of an answer."""

    def __init__(self, model: ServedModel, body: CompletionRequest, prompt: _Prompt) -> None:
        self._body = body
        self._prompt = prompt
        self._logprobs = CompletionLogprobsBuilder(model.tokenizer)
        self._has_begun = False
        self.logprob_sum = 0.0
        self.num_tokens = 0

    def take(self, delta: Delta) -> tuple[str, list[int], list[TokenLogprob | None]]:
        """Return the text, token ids and log-probabilities that this delta adds, echo included."""
        text = delta.text
        ids = list(delta.token_ids)
        entries: list[TokenLogprob | None] = list(delta.logprobs or ())
        self.logprob_sum += sum(entry.logprob for entry in entries if entry is not None)
        self.num_tokens += len(ids)
        if self._body.echo and not self._has_begun:
            text = self._prompt.text + text
            ids = self._prompt.ids + ids
            entries = [*(delta.prompt_logprobs or ()), *entries]
        self._has_begun = True
        return text, ids, entries

    def block(
        self, ids: list[int], entries: list[TokenLogprob | None]
    ) -> CompletionLogprobs | None:
        return None if self._body.logprobs is None else self._logprobs.build(ids, entries)

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / max(1, self.num_tokens)


class _Answer:
    """One answer in the making, as a whole or as events; both join the same deltas."""

    def __init__(
        self,
        job_id: str,
        model: ServedModel,
        job: Job,
        body: CompletionRequest,
        prompts: list[_Prompt],
    ) -> None:
        self._job = job
        self._body = body
        self._choices = [
            _Choice(model, body, prompts[index // job.num_choices])
            for index in range(len(job.requests))
        ]
        self._base = Completion(id=job_id, created=int(time.time()), model=model.name, choices=[])

    async def whole(self) -> Completion:
        texts: list[list[str]] = [[] for _ in self._choices]
        ids: list[list[int]] = [[] for _ in self._choices]
        entries: list[list[TokenLogprob | None]] = [[] for _ in self._choices]
        last: list[Delta | None] = [None] * len(self._choices)
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                text, new_ids, new_entries = self._choices[index].take(delta)
                texts[index].append(text)
                ids[index].extend(new_ids)
                entries[index].extend(new_entries)
                last[index] = delta
        choices = []
        for index in self._kept():
            final = last[index]
            choice = CompletionChoice(
                index=len(choices),
                text="".join(texts[index]),
                logprobs=self._choices[index].block(ids[index], entries[index]),
                finish_reason=final.finish_reason if final else None,
                stop_reason=final.stop_reason if final else None,
            )
            choices.append(choice)
        return msgspec.structs.replace(self._base, choices=choices, usage=self._job.usage())

    def _kept(self) -> list[int]:
        """Return which sequences are answered: of each prompt's best_of the n likeliest."""
        made, wanted = self._job.num_choices, self._body.n or 1
        kept: list[int] = []
        for start in range(0, len(self._choices), made):
            group = range(start, start + made)
            ranked = sorted(group, key=lambda index: -self._choices[index].mean_logprob)
            kept += ranked[:wanted] if made > wanted else group
        return kept

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        wants_usage = bool(options and options.include_usage)
        usage = None if wants_usage else msgspec.UNSET
        async with aclosing(self._job.run()) as deltas:
            async for index, delta in deltas:
                text, ids, entries = self._choices[index].take(delta)
                if not text and delta.finish_reason is None and self._body.logprobs is None:
                    continue
                piece = CompletionChoice(
                    index=index,
                    text=text,
                    logprobs=self._choices[index].block(ids, entries),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
                yield event(msgspec.structs.replace(self._base, choices=[piece], usage=usage))
        if wants_usage:
            yield event(msgspec.structs.replace(self._base, usage=self._job.usage()))
