"""Random adds, steps, drafts, failures, cancels and finishes on tiny pools, against a memory.

`ShadowMemory` does what the model does: it writes each token of a step to its slot, then reads the
whole context through the page list. A wrong page, a page given out twice, a stale prefix, a lost
token or one left by a rejected draft shows as a wrong content.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mxn.engine.kvcache import PageTable
from mxn.engine.plan import SchedulerConfig, StepPlan
from mxn.engine.scheduler import Scheduler
from mxn.engine.sequence import Sequence, SequenceState


class ShadowMemory:
    """One (salt, tokens up to here) for each slot: what attention state depends on."""

    def __init__(self, pages: PageTable) -> None:
        self.page_tokens = pages.page_tokens
        self.slots: list[tuple[bytes, tuple[int, ...]] | None] = [None] * (
            pages.num_pages * pages.page_tokens
        )

    def slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_tokens] * self.page_tokens + position % self.page_tokens

    has_lost_drafts = False  # whether the last run left drafts out, as a pass that failed does

    def run(self, plan: StepPlan) -> None:
        written: set[int] = set()
        for seq, start, num_tokens, pages, _, _, drafts in plan.sequences:
            token_ids = (*seq.token_ids, *drafts)
            for position in range(start, start + num_tokens):
                slot = self.slot(pages, position)
                assert slot not in written, f"slot {slot} is written twice in a step"
                written.add(slot)
                self.slots[slot] = (seq.salt, token_ids[: position + 1])
        for seq, start, num_tokens, pages, _, _, drafts in plan.sequences:
            token_ids = (*seq.token_ids, *drafts)
            for position in range(start + num_tokens):
                want = (seq.salt, token_ids[: position + 1])
                assert self.slots[self.slot(pages, position)] == want, (seq, position)


class RandomDrafter:
    """Guesses what it is told to, and checks that it is told of each guess once."""

    def __init__(self) -> None:
        self.token = 0
        self.num_tokens = 0
        self.open: dict[str, int] = {}
        self.num_accepted = 0

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        assert limit >= 1
        assert seq.can_draft
        return [self.token] * min(limit, self.num_tokens)

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        assert self.open.pop(seq_id) == num_drafted >= num_accepted
        self.num_accepted += num_accepted

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        pass

    def forget(self, seq_id: str) -> None:
        self.open.pop(seq_id, None)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(2, 12),
        page_tokens=st.integers(1, 4),
        max_sequences=st.integers(1, 5),
        spare=st.integers(0, 12),
        chunk=st.none() | st.integers(1, 5),
        prefix_caching=st.booleans(),
        draft_rows=st.integers(0, 12),
    )
    def begin(
        self, num_pages, page_tokens, max_sequences, spare, chunk, prefix_caching, draft_rows
    ):
        self.pages = PageTable(num_pages, page_tokens, prefix_caching=prefix_caching)
        self.config = SchedulerConfig(
            max_batch_tokens=max_sequences + spare,
            max_sequences=max_sequences,
            max_context=max(3, num_pages * page_tokens - 1),
            prefill_chunk=chunk,
            max_draft_rows=draft_rows,
        )
        self.drafter = RandomDrafter()
        self.scheduler = Scheduler(self.config, self.pages, self.drafter)
        self.memory = ShadowMemory(self.pages)
        self.live: dict[str, Sequence] = {}
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.logits: dict[str, list[int]] = {}  # prompt positions delivered
        self.plan: StepPlan | None = None
        self.now_s = 0.0
        self.count = 0

    @rule(
        length=st.sampled_from([4, 8, 12]) | st.integers(1, 14),
        kind=st.integers(0, 1),
        tail=st.integers(0, 1),
        new=st.integers(1, 12),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([b"", b"", b"a"]),
        wants_logits=st.sampled_from([False, False, True]),
        can_draft=st.sampled_from([True, True, False]),
    )
    def add(self, length, kind, tail, new, priority, salt, wants_logits, can_draft):
        length = min(length, self.scheduler.max_context - 1)
        if length < 1:
            return
        prompt = [kind] * (length - 1) + [tail]
        self.count += 1
        seq = Sequence(
            f"s{self.count}", prompt, max_total_tokens=length + new, arrival_s=self.now_s,
            priority=priority, salt=salt, wants_prompt_logits=wants_logits, can_draft=can_draft,
        )  # fmt: skip
        self.scheduler.add(seq)
        self.live[seq.seq_id] = seq
        self.prompts[seq.seq_id] = prompt
        self.outputs[seq.seq_id] = []
        self.logits[seq.seq_id] = []

    @precondition(lambda self: self.plan is None)
    @rule(token=st.integers(0, 2), num_drafts=st.integers(0, 6))
    def plan_a_step(self, token, num_drafts):
        self.now_s += 1
        self.drafter.token, self.drafter.num_tokens = token, num_drafts
        plan = self.scheduler.next(self.now_s)
        assert (plan is None) == (not self.live)
        if plan is None:
            return
        self.check_plan(plan)
        self.drafter.open = {i.seq_id: len(i.drafts) for i in plan.sequences if i.drafts}
        self.memory.run(plan)
        self.plan = plan

    def check_plan(self, plan: StepPlan) -> None:
        config = self.config
        scheduled = {item.seq_id for item in plan.sequences}
        assert len(scheduled) == len(plan.sequences) <= config.max_sequences
        assert sum(item.num_tokens for item in plan.sequences) == plan.num_tokens
        assert plan.num_tokens <= config.max_batch_tokens
        assert not scheduled & set(plan.preempted)
        assert scheduled <= set(self.live)
        for item in plan.sequences:
            assert item.num_tokens >= 1
            assert item.start == item.sequence.num_computed
            seq, end = item.sequence, item.start + item.num_tokens - len(item.drafts)
            assert item.samples == (end == seq.num_tokens)
            num_tokens = seq.num_tokens + len(item.drafts)
            assert len(item.pages) == self.pages.pages_needed(num_tokens)
            if item.drafts:
                assert item.num_logits == item.num_tokens == 1 + len(item.drafts)
                assert num_tokens < (seq.max_total_tokens or 0)
                assert seq.can_draft
                assert not plan.preempted
                assert plan.num_tokens <= config.max_draft_rows
        for seq in self.live.values():  # nothing stops a decode
            is_decode = seq.state is SequenceState.RUNNING and seq.remaining_tokens == 1
            if is_decode and seq.num_output and seq.num_computed >= seq.num_prompt:
                assert seq.seq_id in scheduled

    @precondition(lambda self: self.plan is not None)
    @rule(
        token=st.integers(0, 2),
        stop=st.integers(0, 4),
        cancel=st.integers(0, 8),
        accepted=st.integers(0, 6),
    )
    def commit(self, token, stop, cancel, accepted):
        plan, self.plan = self.plan, None
        accepted = 0 if self.memory.has_lost_drafts else accepted
        for item in plan.sequences[cancel : cancel + 1]:
            if item.seq_id in self.live:
                self.cancel_one(item.seq_id, in_flight=True)
        live = [item for item in plan.sequences if item.seq_id in self.live]
        sampled = {
            item.seq_id: [*item.drafts[:accepted], token] for item in plan.sequences if item.samples
        }
        before = self.drafter.num_accepted
        finished = {item.seq_id for item in live[stop : stop + 1] if item.samples}
        for item in live:
            if item.sequence.wants_prompt_logits:
                end = item.start + item.num_tokens
                rows = range(end - item.num_logits, end)
                self.logits[item.seq_id] += [row for row in rows if row < item.sequence.num_prompt]
            if item.samples:
                self.outputs[item.seq_id] += sampled[item.seq_id]
        full = self.scheduler.commit(plan, sampled, finished)
        assert not set(full) & finished
        want = sum(min(accepted, len(item.drafts)) for item in live)
        assert self.drafter.num_accepted - before == want
        for item in live:
            seq = item.sequence
            if item.drafts and not seq.is_finished:
                assert seq.remaining_tokens == 1
                needed = self.pages.pages_needed(seq.num_computed)
                assert needed <= len(self.pages.pages_of(seq.seq_id)) <= needed + 1
        for item in live:
            if item.seq_id in finished or item.seq_id in full:
                self.check_finished(self.live.pop(item.seq_id), is_full=item.seq_id in full)

    def check_finished(self, seq: Sequence, *, is_full: bool) -> None:
        assert seq.is_finished
        assert seq.is_full or not is_full
        assert seq.seq_id not in self.scheduler
        assert seq.token_ids == self.prompts[seq.seq_id] + self.outputs[seq.seq_id]
        if seq.wants_prompt_logits:
            assert self.logits[seq.seq_id] == list(range(seq.num_prompt))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def step_fails(self):
        plan, self.plan = self.plan, None
        before = [item.sequence.num_computed for item in plan.sequences]
        self.scheduler.abandon(plan)
        assert before == [item.sequence.num_computed for item in plan.sequences]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.live)))
        self.cancel_one(seq_id, in_flight=self.plan is not None)

    def cancel_one(self, seq_id: str, *, in_flight: bool) -> None:
        seq = self.live.pop(seq_id)
        held = list(self.pages.pages_of(seq_id)) if seq.state is SequenceState.RUNNING else []
        used = self.pages.pages_used
        assert self.scheduler.cancel(seq_id)
        assert not self.scheduler.cancel(seq_id)
        if in_flight:
            assert self.pages.pages_used == used  # still being written
        else:
            assert used - len(held) <= self.pages.pages_used <= used
            assert seq_id not in self.scheduler

    @invariant()
    def holds_together(self):
        if hasattr(self, "scheduler"):
            self.scheduler.validate()
            stats = self.scheduler.stats()
            assert stats.num_running + stats.num_waiting == len(self.live)

    def teardown(self):
        """With no new arrivals everything ends, within steps that the work bounds."""
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None:
            self.step_fails()
        work = sum(seq.max_total_tokens or 0 for seq in self.live.values())
        bound = work * (len(self.live) + 1) + 1  # each preemption costs at most one recomputation
        while self.live:
            self.plan_a_step(token=1, num_drafts=2)
            self.commit(token=1, stop=99, cancel=99, accepted=bound % 3)
            bound -= 1
            assert bound >= 0, "a sequence starves"
        assert self.scheduler.next(0.0) is None
        self.scheduler.validate()
        assert self.pages.pages_used == 0
        self.pages.drop_cache()
        assert self.pages.pages_free == self.pages.num_pages
        self.pages.validate()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
