"""The scheduler's random histories once more, through a real runner and a model that reads.

`ShadowModel` writes each token to its slot and reads every context back through the page table it
was given, so a batch that was moved on instead of packed anew shows as a wrong context.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from tests.unit.engine.test_scheduler_stateful import SchedulerMachine

from mxn.engine.kvcache import PageTable
from mxn.engine.plan import SchedulerConfig, StepPlan
from mxn.engine.protocol import SamplingParams
from mxn.engine.runner import Runner
from mxn.engine.sampler import SampledToken, SamplingState
from mxn.engine.scheduler import Scheduler
from mxn.engine.sequence import Sequence
from mxn.kernels.batch import StepBatch

VOCAB = 3


class InjectedFault(RuntimeError):
    """The only error that a pass may meet here."""


class ShadowRunner(Runner):
    def _recover(self, error: Exception, work: Any, result: Any) -> None:
        if not isinstance(error, InjectedFault):
            raise error
        super()._recover(error, work, result)


class ShadowModel:
    """One (position, token) for each slot, and the contexts of the passes since they were asked."""

    vocab_size = VOCAB
    device = torch.device("cpu")

    def __init__(self, num_slots: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * num_slots
        self.contexts: dict[tuple[int, ...], int] = {}
        self.fails_once = False
        self.batches: list[int] = []  # which batch each pass got

    def forward(self, batch: StepBatch, cache: Any) -> torch.Tensor:
        attention = batch.attention
        if self.fails_once and attention.num_sequences > 1:
            self.fails_once = False
            raise InjectedFault
        self.batches.append(id(batch))
        assert attention.context_lens == attention.context_lens_S.tolist()
        assert attention.query_starts == attention.query_starts_S1.tolist()
        assert not attention.derived, "of another step"
        attention.derived["seen"] = True
        written = attention.slots_T.tolist()
        assert len(set(written)) == len(written), "a slot is written twice in a step"
        new = zip(batch.positions_T.tolist(), batch.token_ids_T.tolist(), strict=True)
        for slot, content in zip(written, new, strict=True):
            self.slots[slot] = content
        for s in range(attention.num_sequences):
            self._read(attention, s)
        rows = batch.logits_rows_R
        return torch.zeros(len(written) if rows is None else len(rows), VOCAB)

    def _read(self, attention: Any, s: int) -> None:
        size, length = attention.page_tokens, attention.context_lens[s]
        pages = attention.page_table_SP[s].tolist()
        context = [self.slots[pages[p // size] * size + p % size] for p in range(length)]
        assert [found[0] for found in context if found] == list(range(length))
        tokens = tuple(found[1] for found in context if found)
        self.contexts[tokens] = self.contexts.get(tokens, 0) + 1
        run = attention.run_starts[s]
        held = pages[: -(-length // size)]
        assert run in (-1, held[0] * size)
        if run >= 0:
            assert held == list(range(held[0], held[0] + len(held)))


class FirstToken:
    """A sampler; what the tokens are, the machine decides."""

    def sample(self, logits_RV: torch.Tensor, states: list[SamplingState]) -> list[SampledToken]:
        assert len(logits_RV) == len(states)
        return [SampledToken(0)] * len(states)


class Shadow:
    """Stands where the scheduler's machine has its memory."""

    has_lost_drafts = False

    def __init__(self, pages: PageTable, max_sequences: int) -> None:
        self.model = ShadowModel(pages.num_pages * pages.page_tokens)
        self.runner = ShadowRunner(
            self.model,  # type: ignore[arg-type]
            [],
            FirstToken(),  # type: ignore[arg-type]
            page_tokens=pages.page_tokens,
            max_sequences=max_sequences,
            max_pages=pages.num_pages,
        )
        state = SamplingState(SamplingParams(temperature=0.0), [1])
        self.request = SimpleNamespace(sampling_state=state, num_prompt_logprobs=None, adapter=None)

    def run(self, plan: StepPlan) -> None:
        self.model.contexts.clear()
        might_fail = self.model.fails_once
        requests: Any = {item.seq_id: self.request for item in plan.sequences}
        result = self.runner.run(plan, requests)
        self.has_lost_drafts = might_fail and not self.model.fails_once
        assert not result.failed
        assert set(result.tokens) == {item.seq_id for item in plan.sequences if item.samples}
        for seq, start, num_tokens, _, _, _, drafts in plan.sequences:
            whole = tuple((*seq.token_ids, *drafts)[: start + num_tokens])
            accepted = whole[: len(whole) - len(drafts)]  # a pass that failed runs without them
            assert whole in self.model.contexts or accepted in self.model.contexts


class RunnerMachine(SchedulerMachine):
    @initialize(
        num_pages=st.integers(2, 12),
        page_tokens=st.integers(1, 4),
        max_sequences=st.integers(1, 5),
        spare=st.integers(0, 12),
        chunk=st.none() | st.integers(1, 5),
        prefix_caching=st.booleans(),
        draft_rows=st.integers(0, 12),
    )
    def begin(self, **drawn: Any) -> None:
        super().begin(**drawn)
        self.memory = Shadow(self.pages, self.config.max_sequences)

    @rule()
    def the_next_pass_of_several_fails(self) -> None:
        self.memory.model.fails_once = True

    def cancel_one(self, seq_id: str, *, in_flight: bool) -> None:
        super().cancel_one(seq_id, in_flight=in_flight)
        self.memory.runner.forget(seq_id)

    def check_finished(self, seq: Sequence, *, is_full: bool) -> None:
        super().check_finished(seq, is_full=is_full)
        self.memory.runner.forget(seq.seq_id)


# The base declares its own initializer; a subclass with the same name replaces it.
TestRunnerMachine = RunnerMachine.TestCase
TestRunnerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


class Loop:
    """A scheduler and a runner without drafts, stepped by hand."""

    def __init__(
        self, num_pages: int = 64, page_tokens: int = 4, *, prefix_caching: bool = False
    ) -> None:
        pages = PageTable(num_pages, page_tokens, prefix_caching=prefix_caching)
        config = SchedulerConfig(max_batch_tokens=64, max_sequences=4, max_context=64)
        self.scheduler = Scheduler(config, pages)
        self.shadow = Shadow(pages, 4)

    def add(self, seq_id: str, length: int) -> None:
        self.scheduler.add(Sequence(seq_id, [1] * length, max_total_tokens=60))

    def step(self, finished: tuple[str, ...] = ()) -> int:
        """Run a step; return which batch its pass got."""
        plan = self.scheduler.next(0.0)
        assert plan is not None
        self.shadow.run(plan)
        sampled = {item.seq_id: [2] for item in plan.sequences if item.samples}
        self.scheduler.commit(plan, sampled, finished)
        for seq_id in finished:
            self.shadow.runner.forget(seq_id)
        return self.shadow.model.batches[-1]


def test_a_batch_of_decodes_is_moved_on_until_its_longest_sequence_needs_a_column() -> None:
    loop = Loop()
    loop.add("a", 5)
    loop.add("b", 2)
    loop.step()  # the prompts
    batches = [loop.step() for _ in range(11)]
    # "a" has tokens 5, 6 and 7 in its second page; "b" gets a page of its own in between.
    assert [batches.count(batch) for batch in dict.fromkeys(batches)] == [3, 4, 4]


@pytest.mark.parametrize("change", ["a new one", "one is done", "one is cancelled", "a fault"])
def test_a_change_of_company_packs_anew(change: str) -> None:
    loop = Loop()
    loop.add("a", 1)
    loop.add("b", 1)
    loop.step()
    first = loop.step(finished=("a",) if change == "one is done" else ())
    kept = loop.shadow.runner._decodes  # alive, so that no other object gets its id
    if change == "a new one":
        loop.add("c", 1)
    elif change == "one is cancelled":
        loop.scheduler.cancel("b")
        loop.shadow.runner.forget("b")
    elif change == "a fault":
        loop.shadow.model.fails_once = True
    second = loop.step()
    assert kept is not None
    assert kept.batch is not None
    assert second != first
    assert loop.step() not in (first,)


def test_pages_that_do_not_follow_each_other_end_a_run_within_a_batch() -> None:
    """A short sequence grows up to where another begins; the longest needs no column then."""
    loop = Loop(num_pages=20, page_tokens=2)
    for number, length in enumerate((16, 2, 1)):
        loop.add(f"s{number}", length)
    loop.step()
    steps = []
    for _ in range(6):
        batch = loop.step()
        decodes = loop.shadow.runner._decodes
        assert decodes is not None
        steps.append((batch, -1 in (decodes.batch.attention.run_starts or ())))
    assert steps[4] == (steps[5][0], False)
    assert steps[5][1]


def test_another_sequence_at_the_next_position_is_no_continuation() -> None:
    """Its prompt is cached but for one token, so its first step looks like a decode."""
    loop = Loop(prefix_caching=True)
    loop.scheduler.add(Sequence("c", [0] * 21, max_total_tokens=60))
    loop.add("a", 8)
    loop.step()  # the prompts
    for _ in range(3):
        loop.step()
    first = loop.step(finished=("a",))  # twelve tokens are computed: three pages
    kept = loop.shadow.runner._decodes
    loop.scheduler.add(Sequence("b", [1] * 8 + [2] * 4 + [7], max_total_tokens=60))
    assert loop.step() != first
    assert kept is not None
    assert kept.batch.attention.context_lens == [25, 12]
