"""Who runs in the next step, with which tokens and pages. Pure: time and results are arguments.

Knows sequences and pages; knows no tensors, no sampling, no text, no clock. One step is under way
at a time: `next` gives a `StepPlan`, `commit` (or `abandon`) ends it. Start at `Scheduler.next`.

Rules: each running sequence that decodes gets its one token first; what is left of the token budget
goes to prompts in chunks, in order. The order is arrival time plus `priority_step_s` for each level
of priority, so that a request can only be overtaken by those that arrive a bounded time after it. A
sequence enters when pages for all its tokens are free, and nobody behind it enters before, unless
its prefix is just being computed by another. When pages run out, the last in order gives its pages
up and is computed again later. While a step stays small, decodes carry guesses of their next tokens
(a `Drafter` makes them); only those that came true count as computed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Mapping
from collections.abc import Sequence as Ordered
from operator import attrgetter

from mxn.engine.drafting import Drafting
from mxn.engine.kvcache import PageTable
from mxn.engine.plan import Drafter, ScheduledSequence, SchedulerConfig, SchedulerStats, StepPlan
from mxn.engine.sequence import Sequence, SequenceState
from mxn.errors import CapacityError, InternalError, UserError

_order = attrgetter("order")
_MAX_DEFERRED = 32  # waiting sequences passed over in one step because their prefix is on its way


class Scheduler:
    """Continuous batching over one page table. Not thread safe."""

    def __init__(
        self, config: SchedulerConfig, pages: PageTable, drafter: Drafter | None = None
    ) -> None:
        self.config = config
        self.pages = pages
        self.max_context = min(config.max_context, pages.num_pages * pages.page_tokens)
        self._drafter = drafter
        self._drafting = Drafting(config, pages, self.max_context)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # both sorted by order
        self._running: list[Sequence] = []
        self._in_flight: StepPlan | None = None
        self._leaving: list[Sequence] = []  # cancelled within the step in flight
        self._num_added = 0
        self._steps = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_drafter(self) -> bool:
        return self._drafter is not None

    @property
    def is_idle(self) -> bool:
        """Nothing runs or waits; `next` would return None."""
        return not self._running and not self._waiting

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    def __getitem__(self, seq_id: str) -> Sequence:
        return self._sequences[seq_id]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. `max_total_tokens` is cut to what the context and the pages allow.

        Raises: CapacityError when it can never fit; UserError for an empty prompt, no room for an
        output token, or an id that is under way.
        """
        self._check(seq)
        limit = seq.max_total_tokens
        seq.max_total_tokens = self.max_context if limit is None else min(limit, self.max_context)
        self._num_added += 1
        virtual_s = seq.arrival_s + seq.priority * self.config.priority_step_s
        seq.order = (virtual_s, self._num_added)
        seq.keys = self.pages.make_keys(seq.salt)
        seq.state = SequenceState.WAITING
        self._sequences[seq.seq_id] = seq
        insort(self._waiting, seq, key=_order)

    def cancel(self, seq_id: str) -> bool:
        """Drop a sequence and free its pages at once; False when it is not (or no longer) known.

        Within a step in flight the pages are still being written, so they are freed by that step's
        `commit`, which ignores its result.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.is_finished:
            return False
        if seq.state is SequenceState.WAITING:
            del self._waiting[bisect_left(self._waiting, seq.order, key=_order)]
            self._forget(seq)
            return True
        self._running.remove(seq)
        seq.state = SequenceState.FINISHED
        if self._in_flight is not None:
            self._leaving.append(seq)
        else:
            self._release(seq)
        return True

    def next(self, now_s: float) -> StepPlan | None:
        """Return the next step, or None when there is nothing to do.

        Every step gets at least one sequence further. Raises: InternalError when the step before
        was not committed.
        """
        if self._in_flight is not None:
            raise InternalError(f"step {self._in_flight.step} was not committed")
        if not self._running and not self._waiting:
            return None
        preempted = self._secure_pages()
        scheduled: list[ScheduledSequence] = []
        budget = self._plan_running(scheduled, self.config.max_batch_tokens)
        admitted: list[str] = []
        if not preempted:  # or it would take back the pages it has just given up
            budget = self._admit(scheduled, admitted, budget, now_s)
            if self._drafter is not None:
                budget = self._drafting.plan(self._drafter, scheduled, budget, len(self._running))
        if not scheduled:
            raise InternalError(f"no sequence can run: {self.stats()}")
        self._steps += 1
        num_tokens = self.config.max_batch_tokens - budget
        plan = StepPlan(
            self._steps, tuple(scheduled), num_tokens, tuple(admitted), tuple(preempted)
        )
        self._in_flight = plan
        return plan

    def commit(
        self,
        plan: StepPlan,
        sampled: Mapping[str, Ordered[int]],
        finished: Container[str] = (),
    ) -> list[str]:
        """Enter the results of a step: new tokens of each sequence that samples, and who is done.

        Of a sequence with drafts, all tokens but the last must be drafts that came true, in order.
        Returns the ids that ended because they reached `max_total_tokens`, beside those in
        `finished`. Results of sequences cancelled meanwhile are ignored. Raises: InternalError when
        `plan` is not the step in flight or a sequence that samples has no token.
        """
        self._end(plan)
        full: list[str] = []
        for seq, start, num_tokens, _, samples, num_logits, drafts in plan.sequences:
            if seq.state is SequenceState.FINISHED:
                continue
            seq_id = seq.seq_id
            seq.num_computed = start + num_tokens
            if drafts:
                seq.num_computed -= self._count_rejected(seq_id, drafts, sampled.get(seq_id, ()))
            if samples:
                self._append(seq, sampled.get(seq_id, ()))
            if num_logits and seq.num_prompt_logits < seq.num_prompt:
                seq.num_prompt_logits = min(seq.num_computed, seq.num_prompt)
            self.pages.commit(seq_id, seq.token_ids, seq.num_computed)
            if drafts:
                self.pages.trim(seq_id, len(seq.token_ids))
            if seq_id in finished:
                self._finish(seq)
            elif len(seq.token_ids) >= (seq.max_total_tokens or 0):
                self._finish(seq)
                full.append(seq_id)
        self._release_leaving()
        return full

    def took(self, plan: StepPlan, elapsed_s: float) -> None:
        """Take note of the time of a step, from which follows whether drafts pay."""
        if self._drafter is None:
            return
        num_drafts = sum(len(item.drafts) for item in plan.sequences)
        if plan.num_tokens == len(plan.sequences) + num_drafts:
            self._drafter.observe_step(len(plan.sequences), num_drafts, elapsed_s)

    def abandon(self, plan: StepPlan) -> None:
        """End a step that failed: nothing counts as computed, the same work is planned again.

        Cancel those sequences first that shall not run again.
        """
        self._end(plan)
        self._release_leaving()
        for item in plan.sequences:
            if item.drafts and item.sequence.state is SequenceState.RUNNING:
                self.pages.trim(item.seq_id, item.sequence.num_tokens)

    def stats(self) -> SchedulerStats:
        pages, drafting = self.pages, self._drafting
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            pages_total=pages.num_pages,
            pages_used=pages.pages_used,
            pages_cached=pages.pages_cached,
            steps_total=self._steps,
            preemptions_total=self._preemptions,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            drafts_total=drafting.num_drafts,
            draft_tokens_total=drafting.num_tokens,
            accepted_draft_tokens_total=drafting.num_accepted,
        )

    def validate(self) -> None:
        """Check every invariant; O(pages + sequences). Raises: InternalError that names it."""
        self.pages.validate()
        for name, queue, state in (
            ("waiting", self._waiting, SequenceState.WAITING),
            ("running", self._running, SequenceState.RUNNING),
        ):
            if any(seq.state is not state for seq in queue) or queue != sorted(queue, key=_order):
                raise InternalError(
                    f"scheduler: {name} queue has a foreign state or is not in order"
                )
        known = {seq.seq_id for seq in (*self._waiting, *self._running, *self._leaving)}
        if known != set(self._sequences):
            raise InternalError(f"scheduler: {known ^ set(self._sequences)} in one table only")
        if not self._running and not self._leaving and self.pages.pages_used:
            raise InternalError(f"scheduler: idle, but {self.pages.pages_used} pages are used")

    def _check(self, seq: Sequence) -> None:
        if seq.state is not SequenceState.NEW or seq.seq_id in self._sequences:
            raise UserError(f"sequence {seq.seq_id!r} is under way or was used before")
        if not seq.num_prompt:
            raise UserError("the prompt has no tokens", hint="send at least one token")
        if seq.num_prompt >= self.config.max_context:
            raise CapacityError(
                f"the prompt has {seq.num_prompt} tokens, the context is "
                f"{self.config.max_context} with at least one for the answer",
                hint=f"send at most {self.max_context - 1} tokens",
            )
        if seq.num_prompt >= self.max_context:
            raise CapacityError(
                f"prompt and answer need {self.pages.pages_needed(seq.num_prompt + 1)} cache "
                f"pages, {self.pages.num_pages} exist",
                hint=f"send at most {self.max_context - 1} tokens or give the cache more memory",
            )
        if seq.max_total_tokens is not None and seq.max_total_tokens <= seq.num_prompt:
            raise UserError(
                f"max_total_tokens {seq.max_total_tokens} leaves no room behind a prompt of "
                f"{seq.num_prompt}"
            )

    def _secure_pages(self) -> list[str]:
        """Give every running sequence pages for all its tokens; return who had to leave."""
        running, grow = self._running, self.pages.grow
        preempted: list[str] = []
        index = 0
        while index < len(running):
            seq = running[index]
            if grow(seq.seq_id, len(seq.token_ids)):
                index += 1
            else:
                preempted.append(self._preempt_last())
        return preempted

    def _preempt_last(self) -> str:
        seq = self._running.pop()
        self.pages.free(seq.seq_id)
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.state = SequenceState.WAITING
        insort(self._waiting, seq, key=_order)
        self._preemptions += 1
        return seq.seq_id

    def _plan_running(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        """Plan the decodes, then the prompts under way; return what is left of `budget`."""
        prompts: list[Sequence] = []
        pages_of = self.pages.pages_of
        for seq in self._running:
            start = seq.num_computed
            if len(seq.token_ids) - start == 1 and start >= seq.num_prompt:
                pages = pages_of(seq.seq_id)
                scheduled.append(ScheduledSequence(seq, start, 1, pages, True, 1))
            else:
                prompts.append(seq)
        budget -= len(scheduled)
        for seq in prompts:
            if budget <= 0:
                break
            budget -= self._plan_chunk(scheduled, seq, budget)
        return budget

    def _plan_chunk(self, scheduled: list[ScheduledSequence], seq: Sequence, budget: int) -> int:
        start, end = seq.num_computed, len(seq.token_ids)
        num_tokens = min(end - start, budget, self.config.prefill_chunk or budget)
        samples = start + num_tokens == end
        num_logits = int(samples)
        if seq.wants_prompt_logits and seq.num_prompt_logits < seq.num_prompt:
            num_logits = max(0, start + num_tokens - max(start, seq.num_prompt_logits))
        pages = self.pages.pages_of(seq.seq_id)
        scheduled.append(ScheduledSequence(seq, start, num_tokens, pages, samples, num_logits))
        return num_tokens

    def _count_rejected(self, seq_id: str, drafts: Ordered[int], tokens: Ordered[int]) -> int:
        """Return how many of `drafts` do not count as computed; note the others."""
        num_accepted = self._drafting.count_accepted(seq_id, drafts, tokens)
        if self._drafter is not None:
            self._drafter.observe(seq_id, len(drafts), num_accepted)
        return len(drafts) - num_accepted

    def _admit(
        self, scheduled: list[ScheduledSequence], admitted: list[str], budget: int, now_s: float
    ) -> int:
        """Let waiting sequences begin, in order, while there is room; return the budget left."""
        waiting, running = self._waiting, self._running
        index = 0
        while budget > 0 and index < len(waiting) and len(running) < self.config.max_sequences:
            seq = waiting[index]
            num_matched = self._match(seq)
            if self._is_worth_waiting(seq, num_matched):
                index += 1
                if index == _MAX_DEFERRED:
                    break
                continue
            # Each running sequence may soon need a page; entering without that means thrashing.
            if not self.pages.allocate(
                seq.seq_id, seq.token_ids, seq.keys, num_matched=num_matched, keep_free=len(running)
            ):
                break
            del waiting[index]
            insort(running, seq, key=_order)
            self._begin(seq, num_matched * self.pages.page_tokens, now_s)
            admitted.append(seq.seq_id)
            budget -= self._plan_chunk(scheduled, seq, budget)
        return budget

    def _match(self, seq: Sequence) -> int:
        if seq.wants_prompt_logits and seq.num_prompt_logits < seq.num_prompt:
            return 0  # a cached page has no logits
        return self.pages.match_prefix(seq.token_ids, seq.keys)

    def _is_worth_waiting(self, seq: Sequence, num_matched: int) -> bool:
        """Another sequence is computing the next page of this one, so it will be a cache hit."""
        if seq.wants_prompt_logits and seq.num_prompt_logits < seq.num_prompt:
            return False
        return self.pages.is_pending(seq.keys, num_matched)

    def _begin(self, seq: Sequence, num_cached: int, now_s: float) -> None:
        seq.state = SequenceState.RUNNING
        seq.num_computed = num_cached
        if seq.first_scheduled_s is None:
            seq.first_scheduled_s = now_s
            seq.cached_tokens = num_cached
            self._prompt_tokens += seq.num_prompt
            self._cached_tokens += num_cached

    def _append(self, seq: Sequence, tokens: Ordered[int]) -> None:
        if not tokens:
            raise InternalError(f"sequence {seq.seq_id!r} samples, but no token was given")
        if len(tokens) == 1:
            seq.token_ids.append(tokens[0])
        else:
            seq.token_ids += tokens[: (seq.max_total_tokens or 0) - len(seq.token_ids)]

    def _finish(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        self.pages.free(seq.seq_id)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        seq.state = SequenceState.FINISHED
        del self._sequences[seq.seq_id]
        if self._drafter is not None:
            self._drafter.forget(seq.seq_id)

    def _end(self, plan: StepPlan) -> None:
        if plan is not self._in_flight:
            raise InternalError(f"step {plan.step} is not the one in flight")
        self._in_flight = None

    def _release_leaving(self) -> None:
        for seq in self._leaving:
            self._release(seq)
        self._leaving.clear()
