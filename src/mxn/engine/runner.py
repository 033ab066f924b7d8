"""Runs a planned step on the device: tensors in, sampled tokens and log-probabilities out.

The only part of the loop that touches a chip. Knows pages, rows and logits; knows no text, no stop
rules and no policy. Start at `Runner.run`.

When a forward pass fails, the step is halved until what fails stands alone, so that one request
that does not fit or that breaks a kernel takes nobody with it. Writing the same keys and values to
the same slots again is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from mxn.engine.mtp import Computed, PredictingDecoder, Predictor
from mxn.engine.stepbatch import Chunk, PageRows, pack
from mxn.errors import ChipError
from mxn.models.lora import Part

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.engine.adapters import Adapter, Adapters
    from mxn.engine.draft import MtpDrafter
    from mxn.engine.protocol import TokenLogprob
    from mxn.engine.sampler import SampledToken, Sampler, SamplingState
    from mxn.engine.scheduler import ScheduledSequence, StepPlan
    from mxn.models.base import CausalLM, LayerCache

log = logging.getLogger("mxn.engine")

# Logits of one forward pass, as a count of float32: 64 Mi are 256 MiB. Only log-probabilities of
# prompts ever come near it; such a step is then cut into several passes.
MAX_LOGITS = 64 * 2**20
# A single prompt that runs out of memory is halved down to this many tokens before it is given up.
MIN_SPLIT_TOKENS = 8


class Sampled(Protocol):
    """What the runner wants to know of a request: how it samples, whether its prompt is scored."""

    sampling_state: SamplingState
    num_prompt_logprobs: int | None  # alternatives beside each prompt token; None: not wanted
    adapter: Adapter | None  # None: the base model


@dataclass(slots=True)
class StepResult:
    """What a step brought, by request id."""

    tokens: dict[str, list[SampledToken]] = field(default_factory=dict)  # one, and one each draft
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # request id -> reason


@dataclass(slots=True)
class _Work:
    """One sequence's part of a forward pass."""

    scheduled: ScheduledSequence
    request: Sampled
    chunk: Chunk
    samples: bool
    drafts: Sequence[int] = ()  # the last tokens of `chunk`, guessed


class Runner:
    """Owns the cache tensors of one decoder and drives its forward passes."""

    def __init__(
        self,
        model: CausalLM,
        cache: list[LayerCache],
        sampler: Sampler,
        *,
        page_tokens: int,
        max_sequences: int,
        max_pages: int,
        adapters: Adapters | None = None,
        drafter: MtpDrafter | None = None,
    ) -> None:
        """`max_pages` is the longest a sequence can get, `max_sequences` how many hold pages.

        `drafter` gets the guesses of a model that can make them, a `PredictingDecoder`.
        """
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._adapters = adapters
        self._page_tokens = page_tokens
        self._pages = PageRows(max_sequences, max_pages)
        self._row_of: dict[str, int] = {}
        self._max_rows = max(1, MAX_LOGITS // model.vocab_size)
        self._predictor: Predictor | None = None
        if drafter is not None:
            assert isinstance(model, PredictingDecoder)
            self._predictor = Predictor(model, cache[-1], self._pages, page_tokens, drafter)

    @torch.inference_mode()
    def run(self, plan: StepPlan, requests: Mapping[str, Sampled]) -> StepResult:
        """Compute `plan`; every sequence of it is then in the result or in its `failed`.

        Raises: ChipError when the device does not work any more.
        """
        for seq_id in plan.preempted:
            self.forget(seq_id)
        result = StepResult()
        work = self._work(plan, requests)
        self._run(work, result)
        for part in work:
            if part.drafts:  # pages behind those that stay may be others next time
                self._pages.cut(part.chunk.table_row, part.chunk.start // self._page_tokens)
        return result

    def forget(self, seq_id: str) -> None:
        """The sequence has given its pages back."""
        row = self._row_of.pop(seq_id, None)
        if row is not None:
            self._pages.release(row)

    @property
    def num_sequences(self) -> int:
        """Sequences whose pages are known here; 0 when idle."""
        return len(self._row_of)

    def _work(self, plan: StepPlan, requests: Mapping[str, Sampled]) -> list[_Work]:
        work = []
        pages, row_of = self._pages, self._row_of
        for scheduled in plan.sequences:
            sequence, start, num_tokens, page_ids, samples, num_logits, drafts = scheduled
            row = row_of.get(sequence.seq_id)
            if row is None:
                row = row_of[sequence.seq_id] = pages.take()
            pages.update(row, page_ids)
            new = sequence.token_ids[start : start + num_tokens]
            chunk = Chunk(row, start, [*new, *drafts] if drafts else new, num_logits)
            work.append(_Work(scheduled, requests[sequence.seq_id], chunk, samples, drafts))
        return work

    def _run(self, work: list[_Work], result: StepResult) -> None:
        """Run `work` in one pass, or in parts where it is too large or fails as a whole."""
        work = [part for part in work if part.scheduled.seq_id not in result.failed]
        if not work:
            return
        if sum(part.chunk.num_logits for part in work) > self._max_rows and _can_split(work):
            self._run_smaller(work, result)
            return
        try:
            logits_RV = self._forward(work)
            self._collect(work, logits_RV, result)
            if self._predictor is not None:
                self._predict(self._predictor, work, result)
        except Exception as error:  # whatever a chip throws
            check_device(self._model.device, error)
            if _has_drafts(work) or len(work) > 1 or (is_out_of_memory(error) and _can_split(work)):
                self._run_smaller(work, result)
            else:
                result.failed[work[0].scheduled.seq_id] = _reason(error, work[0])

    def _run_smaller(self, work: list[_Work], result: StepResult) -> None:
        """Run `work` without its drafts, which nobody waits for, or in two halves."""
        if _has_drafts(work):
            self._run([_without_drafts(part) for part in work], result)
            return
        first, second = _halve(work)
        self._run(first, result)
        self._run(second, result)

    def _forward(self, work: list[_Work]) -> Tensor:
        batch = pack(
            [part.chunk for part in work], self._pages, self._page_tokens, self._model.device
        )
        adapted = self._adapters.adapted if self._adapters else None
        if adapted is None or all(part.request.adapter is None for part in work):
            return self._model.forward(batch, self._cache)
        with adapted.applied([_rows_of(part) for part in work]):
            return self._model.forward(batch, self._cache)

    def _collect(self, work: list[_Work], logits_RV: Tensor, result: StepResult) -> None:
        """Sample, and score prompt tokens, from the rows that `work` asked for, in its order.

        `result` changes only when nothing can fail any more.
        """
        num_rows, rows, sampling = 0, [], []
        scored: dict[str, list[TokenLogprob]] = {}
        for part in work:
            first, num_rows = num_rows, num_rows + part.chunk.num_logits
            if part.samples:
                rows.extend(range(num_rows - 1 - len(part.drafts), num_rows))
                sampling.append(part)
            if part.request.num_prompt_logprobs is not None and part.chunk.num_logits:
                scored[part.scheduled.seq_id] = self._score_prompt(part, logits_RV[first:num_rows])
        tokens = self._sample(sampling, rows, logits_RV) if sampling else []
        for seq_id, logprobs in scored.items():
            result.prompt_logprobs.setdefault(seq_id, []).extend(logprobs)
        first = 0
        for part in sampling:
            last = first + len(part.drafts)
            found = tokens[first : last + 1] if part.drafts else [tokens[first]]
            first = last + 1
            if found[0].is_broken:
                result.failed[part.scheduled.seq_id] = "the model gave no finite logit"
            else:
                result.tokens[part.scheduled.seq_id] = _verified(found, part.drafts)

    def _sample(self, work: list[_Work], rows: list[int], logits_RV: Tensor) -> list[SampledToken]:
        if len(rows) != len(logits_RV):
            logits_RV = logits_RV[torch.tensor(rows, device=logits_RV.device)]
        states: list[SamplingState] = []
        for part in work:
            state = part.request.sampling_state
            states.append(state)
            for draft in part.drafts:
                state = state.after(draft)
                states.append(state)
        return self._sampler.sample(logits_RV, states)

    def _predict(self, predictor: Predictor, work: list[_Work], result: StepResult) -> None:
        """Let the model guess what comes behind the tokens of `work`."""
        parts: list[Computed | None] = []
        for part in work:
            chunk, sequence = part.chunk, part.scheduled.sequence
            tokens = result.tokens.get(sequence.seq_id)
            num_rows = len(chunk.token_ids)
            if not part.samples:
                next_id = sequence.token_ids[chunk.start + num_rows]
            elif tokens:
                num_rows += len(tokens) - 1 - len(part.drafts)
                next_id = tokens[-1].token_id
            else:
                parts.append(None)
                continue
            num_pages = len(part.scheduled.pages)
            parts.append(Computed(sequence, chunk, num_pages, num_rows, next_id, part.samples))
        try:
            predictor.predict(parts, [len(part.chunk.token_ids) for part in work])
        except Exception as error:  # the tokens are there: the next step has fewer guesses
            check_device(self._model.device, error)

    def _score_prompt(self, part: _Work, logits_QV: Tensor) -> list[TokenLogprob]:
        """Return the log-probability of each prompt token that these rows predict."""
        sequence, chunk = part.scheduled.sequence, part.chunk
        first = chunk.start + len(chunk.token_ids) - len(logits_QV) + 1
        next_ids = sequence.token_ids[first : min(first + len(logits_QV), sequence.num_prompt)]
        if not next_ids:
            return []
        num_top = part.request.num_prompt_logprobs or 0
        return self._sampler.prompt_logprobs(logits_QV[: len(next_ids)], next_ids, num_top)


def _verified(tokens: list[SampledToken], drafts: Sequence[int]) -> list[SampledToken]:
    """Return the tokens that would have come one by one: those behind drafts that came true.

    Each was drawn from its own row with the random number of its own position, so it does not
    depend on whether it was guessed. A broken one stays away; the next step meets it again.
    """
    num_kept = 1
    for draft, token, following in zip(drafts, tokens, tokens[1:], strict=False):
        if draft != token.token_id or following.is_broken:
            break
        num_kept += 1
    return tokens[:num_kept]


def _has_drafts(work: Sequence[_Work]) -> bool:
    return any(part.drafts for part in work)


def _without_drafts(part: _Work) -> _Work:
    if not part.drafts:
        return part
    chunk = part.chunk.without_last(len(part.drafts))
    return _Work(part.scheduled, part.request, chunk, part.samples)


def _rows_of(part: _Work) -> Part:
    adapter, chunk = part.request.adapter, part.chunk
    key = None if adapter is None else adapter.generation
    return Part(key, len(chunk.token_ids), chunk.num_logits)


def check_device(device: torch.device, error: Exception) -> None:
    """Note a failure and make sure that the device still computes.

    Raises: ChipError when it does not: the process then ends, and a new one begins afresh.
    """
    log.error("forward pass failed: %s: %s", type(error).__name__, _first_line(error))
    log.debug("where it failed", exc_info=error)
    if isinstance(error, ChipError):
        raise error
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    try:
        if empty_cache and is_out_of_memory(error):
            empty_cache()
        is_alive = (torch.ones(2, device=device) + 1).sum().item() == 4
    except Exception as second:
        raise ChipError(
            f"{device} stopped working after: {_first_line(error)}", device=str(device)
        ) from second
    if not is_alive:
        raise ChipError(f"{device} computes 1 + 1 wrongly", device=str(device)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a chip said that memory ran out; makers raise different classes for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def _can_split(work: Sequence[_Work]) -> bool:
    return len(work) > 1 or len(work[0].chunk.token_ids) >= 2 * MIN_SPLIT_TOKENS


def _halve(work: list[_Work]) -> tuple[list[_Work], list[_Work]]:
    """Return two parts to run one after the other: by sequences, or a single one by its tokens."""
    if len(work) > 1:
        middle = len(work) // 2
        return work[:middle], work[middle:]
    part = work[0]
    first, second = part.chunk.split(len(part.chunk.token_ids) // 2)
    return (
        [_Work(part.scheduled, part.request, first, samples=False)],
        [_Work(part.scheduled, part.request, second, part.samples)],
    )


def _reason(error: Exception, part: _Work) -> str:
    if is_out_of_memory(error):
        context = part.chunk.start + len(part.chunk.token_ids)
        return f"the device ran out of memory at a context of {context} tokens"
    return f"the model failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
