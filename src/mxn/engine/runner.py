"""Runs a planned step on the device: tensors in, sampled tokens and log-probabilities out.

The only part of the loop that touches a chip. Knows pages, rows and logits; knows no text, no stop
rules and no policy. Start at `Runner.run`.

When a forward pass fails, the step is halved until what fails stands alone, so that one request
that does not fit or that breaks a kernel takes nobody with it. Writing the same keys and values to
the same slots again is harmless.

A step in which every sequence computes one token has a shorter way (`DecodeBatch`): between two
steps a model's weights push everything else out of the processor's caches, so what a step touches
beside them is read from memory again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mxn.engine.decodebatch import DecodeBatch
from mxn.engine.devicecheck import check_device, is_out_of_memory
from mxn.engine.mtp import Computed, PredictingDecoder, Predictor
from mxn.engine.stepbatch import Chunk, PageRows, pack
from mxn.engine.work import (
    Sampled,
    Work,
    can_split,
    halve,
    has_drafts,
    reason_of,
    rows_of,
    without_drafts,
)
from mxn.models.base import OwnsCache

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.engine.adapters import Adapters
    from mxn.engine.draft import MtpDrafter
    from mxn.engine.plan import ScheduledSequence, StepPlan
    from mxn.engine.protocol import TokenLogprob
    from mxn.engine.sampler import SampledToken, Sampler, SamplingState
    from mxn.kernels.batch import StepBatch
    from mxn.models.base import CausalLM, LayerCache

# Logits of one forward pass, as a count of float32: 64 Mi are 256 MiB. Only log-probabilities of
# prompts ever come near it; such a step is then cut into several passes.
MAX_LOGITS = 64 * 2**20


@dataclass(slots=True)
class StepResult:
    """What a step brought, by request id."""

    tokens: dict[str, list[SampledToken]] = field(default_factory=dict)  # one, and one each draft
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # request id -> reason


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
        self._decodes: DecodeBatch | None = None  # of the last step, if it had decodes only
        self._max_rows = max(1, MAX_LOGITS // model.vocab_size)
        # A model with a cache of its own computes outside torch: nothing would be recorded.
        self._mode = nullcontext if isinstance(model, OwnsCache) else torch.inference_mode
        self._predictor: Predictor | None = None
        if drafter is not None:
            assert isinstance(model, PredictingDecoder)
            self._predictor = Predictor(model, cache[-1], self._pages, page_tokens, drafter)

    def run(self, plan: StepPlan, requests: Mapping[str, Sampled]) -> StepResult:
        """Compute `plan`; every sequence of it is then in the result or in its `failed`.

        Raises: ChipError when the device does not work any more.
        """
        for seq_id in plan.preempted:
            self.forget(seq_id)
        result = StepResult()
        with self._mode():
            if self._is_decode(plan, requests):
                self._run_decodes(plan, requests, result)
            else:
                self._run_all(plan, requests, result)
        return result

    def _run_all(self, plan: StepPlan, requests: Mapping[str, Sampled], result: StepResult) -> None:
        self._decodes = None  # its sequences may get other pages, and go on elsewhere
        work = self._work(plan, requests)
        self._run(work, result)
        for part in work:
            if part.drafts:  # pages behind those that stay may be others next time
                self._pages.cut(part.chunk.table_row, part.chunk.start // self._page_tokens)

    def forget(self, seq_id: str) -> None:
        """The sequence has given its pages back."""
        row = self._row_of.pop(seq_id, None)
        if row is not None:
            self._pages.release(row)

    @property
    def num_sequences(self) -> int:
        """Sequences whose pages are known here; 0 when idle."""
        return len(self._row_of)

    def _is_decode(self, plan: StepPlan, requests: Mapping[str, Sampled]) -> bool:
        """Return whether `plan` is what `_run_decodes` can do."""
        if not plan.is_decode or self._predictor or len(plan.sequences) > self._max_rows:
            return False
        adapted = self._adapters.adapted if self._adapters else None
        return adapted is None or all(
            requests[item.sequence.seq_id].adapter is None for item in plan.sequences
        )

    def _run_decodes(
        self, plan: StepPlan, requests: Mapping[str, Sampled], result: StepResult
    ) -> None:
        """Compute one token of each sequence in one pass; in parts when that fails."""
        items = plan.sequences
        try:
            logits_SV = self._model.forward(self._decode_batch(items), self._cache)
            states = [requests[item.sequence.seq_id].sampling_state for item in items]
            tokens = self._sampler.sample(logits_SV, states)
        except Exception as error:  # whatever a chip throws
            self._decodes = None
            self._recover(error, self._work(plan, requests), result)
            return
        for item, token in zip(items, tokens, strict=True):
            _enter(item.sequence.seq_id, [token], (), result)

    def _decode_batch(self, items: Sequence[ScheduledSequence]) -> StepBatch:
        """Return the batch of the last step moved on where it can be, else a new one."""
        decodes = self._decodes
        if decodes is None or not decodes.move_on(items):
            rows = [self._table_row(item) for item in items]
            decodes = DecodeBatch(items, rows, self._pages, self._page_tokens, self._model.device)
            self._decodes = decodes
        return decodes.batch

    def _table_row(self, item: ScheduledSequence) -> int:
        """Return the row of a sequence in the page table, which then knows all its pages."""
        seq_id = item.sequence.seq_id
        row = self._row_of.get(seq_id)
        if row is None:
            row = self._row_of[seq_id] = self._pages.take()
        self._pages.update(row, item.pages)
        return row

    def _work(self, plan: StepPlan, requests: Mapping[str, Sampled]) -> list[Work]:
        work = []
        for item in plan.sequences:
            sequence, start, num_tokens, _, samples, num_logits, drafts = item
            new = sequence.token_ids[start : start + num_tokens]
            tokens = [*new, *drafts] if drafts else new
            chunk = Chunk(self._table_row(item), start, tokens, num_logits)
            work.append(Work(item, requests[sequence.seq_id], chunk, samples, drafts))
        return work

    def _run(self, work: list[Work], result: StepResult) -> None:
        """Run `work` in one pass, or in parts where it is too large or fails as a whole."""
        work = [part for part in work if part.scheduled.seq_id not in result.failed]
        if not work:
            return
        if sum(part.chunk.num_logits for part in work) > self._max_rows and can_split(work):
            self._run_smaller(work, result)
            return
        try:
            logits_RV = self._forward(work)
            self._collect(work, logits_RV, result)
            if self._predictor is not None:
                self._predict(self._predictor, work, result)
        except Exception as error:  # whatever a chip throws
            self._recover(error, work, result)

    def _recover(self, error: Exception, work: list[Work], result: StepResult) -> None:
        """Run `work` in parts after its pass failed; what fails alone is given up."""
        check_device(self._model.device, error)
        if has_drafts(work) or len(work) > 1 or (is_out_of_memory(error) and can_split(work)):
            self._run_smaller(work, result)
        else:
            result.failed[work[0].scheduled.seq_id] = reason_of(error, work[0])

    def _run_smaller(self, work: list[Work], result: StepResult) -> None:
        """Run `work` without its drafts, which nobody waits for, or in two halves."""
        if has_drafts(work):
            self._run([without_drafts(part) for part in work], result)
            return
        first, second = halve(work)
        self._run(first, result)
        self._run(second, result)

    def _forward(self, work: list[Work]) -> Tensor:
        batch = pack(
            [part.chunk for part in work], self._pages, self._page_tokens, self._model.device
        )
        adapted = self._adapters.adapted if self._adapters else None
        if adapted is None or all(part.request.adapter is None for part in work):
            return self._model.forward(batch, self._cache)
        with adapted.applied([rows_of(part) for part in work]):
            return self._model.forward(batch, self._cache)

    def _collect(self, work: list[Work], logits_RV: Tensor, result: StepResult) -> None:
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
            _enter(part.scheduled.seq_id, found, part.drafts, result)

    def _sample(self, work: list[Work], rows: list[int], logits_RV: Tensor) -> list[SampledToken]:
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

    def _predict(self, predictor: Predictor, work: list[Work], result: StepResult) -> None:
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

    def _score_prompt(self, part: Work, logits_QV: Tensor) -> list[TokenLogprob]:
        """Return the log-probability of each prompt token that these rows predict."""
        sequence, chunk = part.scheduled.sequence, part.chunk
        first = chunk.start + len(chunk.token_ids) - len(logits_QV) + 1
        next_ids = sequence.token_ids[first : min(first + len(logits_QV), sequence.num_prompt)]
        if not next_ids:
            return []
        num_top = part.request.num_prompt_logprobs or 0
        return self._sampler.prompt_logprobs(logits_QV[: len(next_ids)], next_ids, num_top)


def _enter(
    seq_id: str, tokens: list[SampledToken], drafts: Sequence[int], result: StepResult
) -> None:
    """Enter what was sampled from the rows of one sequence."""
    if tokens[0].is_broken:
        result.failed[seq_id] = "the model gave no finite logit"
    else:
        result.tokens[seq_id] = _verified(tokens, drafts) if drafts else tokens


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
