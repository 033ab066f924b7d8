"""The rules of the scheduler, one by one: who runs, in what order, and what is refused."""

from __future__ import annotations

from zlib import crc32

import pytest

from mxn.engine.kvcache import PageTable
from mxn.engine.plan import SchedulerConfig, StepPlan
from mxn.engine.scheduler import Scheduler
from mxn.engine.sequence import Sequence
from mxn.errors import CapacityError, ConfigError, InternalError, UserError


def make(num_pages: int = 64, page_tokens: int = 4, **config: object) -> Scheduler:
    values = {"max_batch_tokens": 16, "max_sequences": 4, "max_context": 64, **config}
    return Scheduler(SchedulerConfig(**values), PageTable(num_pages, page_tokens))  # type: ignore[arg-type]


def seq(name: str, length: int, **options: object) -> Sequence:
    """A prompt that shares no prefix with another of a different name."""
    return Sequence(name, [crc32(name.encode())] * length, **options)  # type: ignore[arg-type]


def shape(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    assert plan is not None
    return [(item.seq_id, item.start, item.num_tokens, item.samples) for item in plan.sequences]


def step(scheduler: Scheduler, token: int = 0) -> list[tuple[str, int, int, bool]]:
    plan = scheduler.next(0.0)
    assert plan is not None
    scheduler.commit(plan, {item.seq_id: [token] for item in plan.sequences if item.samples})
    scheduler.validate()
    return shape(plan)


def test_decodes_go_first_and_a_long_prompt_gets_what_is_left():
    scheduler = make()
    scheduler.add(seq("a", 3))
    assert step(scheduler) == [("a", 0, 3, True)]
    scheduler.add(seq("long", 40))
    assert step(scheduler) == [("a", 3, 1, True), ("long", 0, 15, False)]
    assert step(scheduler) == [("a", 4, 1, True), ("long", 15, 15, False)]
    assert step(scheduler) == [("a", 5, 1, True), ("long", 30, 10, True)]
    assert step(scheduler) == [("a", 6, 1, True), ("long", 40, 1, True)]


def test_prefill_chunk_caps_one_sequence_and_leaves_room_for_the_next():
    scheduler = make(prefill_chunk=6)
    scheduler.add(seq("a", 20))
    scheduler.add(seq("b", 20))
    scheduler.add(seq("c", 20))
    assert step(scheduler) == [("a", 0, 6, False), ("b", 0, 6, False), ("c", 0, 4, False)]


def test_priority_counts_as_a_bounded_head_start():
    scheduler = make(max_sequences=1, priority_step_s=10.0)
    scheduler.add(seq("low", 2, priority=1, arrival_s=0.0))
    scheduler.add(seq("late", 2, priority=0, arrival_s=11.0))
    scheduler.add(seq("urgent", 2, priority=0, arrival_s=9.0))
    order = []
    while (plan := scheduler.next(0.0)) is not None:
        order.append(plan.sequences[0].seq_id)
        scheduler.commit(plan, {order[-1]: [0]}, finished={order[-1]})
    assert order == ["urgent", "low", "late"]


def test_an_endless_stream_of_urgent_arrivals_does_not_starve_an_old_request():
    scheduler = make(max_sequences=2, num_pages=8, priority_step_s=5.0)
    scheduler.add(seq("old", 20, priority=3, max_total_tokens=24, arrival_s=0.0))
    for now in range(200):
        scheduler.add(seq(f"n{now}", 9, priority=0, max_total_tokens=11, arrival_s=float(now)))
        step(scheduler)
        if "old" not in scheduler:
            break
    assert "old" not in scheduler
    assert now < 80  # 15 s of head start at one arrival per step, about 3 steps each


def test_a_large_request_waiting_for_pages_is_not_overtaken_by_small_ones():
    scheduler = make(num_pages=8)
    scheduler.add(seq("runs", 12, max_total_tokens=20))
    step(scheduler)
    scheduler.add(seq("large", 28))
    scheduler.add(seq("small", 2))
    for _ in range(7):
        assert {item[0] for item in step(scheduler)} == {"runs"}
    assert [item[0] for item in step(scheduler)] == ["large"]


def test_when_pages_run_out_the_last_in_order_leaves_and_keeps_its_output():
    scheduler = make(num_pages=5, max_context=20)
    first, last = seq("first", 7), seq("last", 7)
    scheduler.add(first)
    step(scheduler, token=5)
    scheduler.add(last)
    while not last.num_preemptions:
        step(scheduler, token=5)
    assert first.num_preemptions == 0
    output = last.output_ids
    assert output
    assert scheduler.num_waiting == 1
    assert scheduler.cancel("first")
    ((name, start, num_tokens, samples),) = step(scheduler, token=6)
    assert (name, start + num_tokens, samples) == ("last", 7 + len(output), True)
    assert start == 8  # its full pages were still in the prefix cache
    assert last.output_ids == [*output, 6]


def test_equal_prompts_wait_for_the_prefix_instead_of_computing_it_twice():
    scheduler = make()
    for name in ("a", "b", "c"):
        scheduler.add(Sequence(name, [7] * 13))
    scheduler.add(seq("other", 3))
    assert step(scheduler) == [("a", 0, 13, True), ("other", 0, 3, True)]
    assert step(scheduler) == [
        ("a", 13, 1, True), ("other", 3, 1, True), ("b", 12, 1, True), ("c", 12, 1, True)
    ]  # fmt: skip
    assert scheduler["b"].cached_tokens == 12
    assert scheduler.stats().cached_tokens_total == 24


def test_prompt_logits_are_delivered_once_for_each_position_and_skip_the_cache():
    scheduler = make()
    scheduler.add(Sequence("a", [7] * 20))
    step(scheduler)
    step(scheduler)
    scheduler.add(Sequence("b", [7] * 20, wants_prompt_logits=True))
    rows = []
    for _ in range(3):
        plan = scheduler.next(0.0)
        assert plan is not None
        item = plan.sequences[-1]
        rows.append((item.seq_id, item.start, item.num_tokens, item.num_logits))
        scheduler.commit(plan, {x.seq_id: [0] for x in plan.sequences if x.samples})
    assert rows == [("b", 0, 15, 15), ("b", 15, 5, 5), ("b", 20, 1, 1)]
    assert scheduler["b"].cached_tokens == 0


def test_cancel_frees_pages_at_once_between_steps():
    scheduler = make()
    scheduler.add(seq("a", 9))
    step(scheduler)
    assert scheduler.stats().pages_used == 3
    assert scheduler.cancel("a")
    assert scheduler.stats().pages_used == 0
    assert scheduler.next(0.0) is None


def test_cancel_within_a_step_keeps_the_pages_until_its_commit():
    scheduler = make()
    scheduler.add(seq("a", 9))
    plan = scheduler.next(0.0)
    assert plan is not None
    assert scheduler.cancel("a")
    assert scheduler.stats().pages_used == 3
    with pytest.raises(UserError, match="under way"):
        scheduler.add(seq("a", 2))
    assert scheduler.commit(plan, {"a": [1]}) == []
    assert scheduler.stats().pages_used == 0
    scheduler.add(seq("a", 2))


def test_several_tokens_of_one_step_count_and_stop_at_the_limit():
    scheduler = make()
    scheduler.add(seq("a", 3, max_total_tokens=8))
    plan = scheduler.next(0.0)
    assert plan is not None
    scheduler.commit(plan, {"a": [1, 2, 3]})
    plan = scheduler.next(0.0)
    assert shape(plan) == [("a", 3, 3, True)]
    target = scheduler["a"]
    assert scheduler.commit(plan, {"a": [4, 5, 6]}) == ["a"]  # type: ignore[arg-type]
    assert target.output_ids == [1, 2, 3, 4, 5]


def test_what_can_never_fit_is_refused_with_both_numbers():
    scheduler = make(num_pages=4, max_context=64)
    with pytest.raises(CapacityError, match="64 tokens, the context is 64"):
        scheduler.add(seq("a", 64))
    with pytest.raises(CapacityError, match="need 5 cache pages, 4 exist"):
        scheduler.add(seq("b", 16))
    with pytest.raises(UserError, match="no tokens"):
        scheduler.add(seq("c", 0))
    with pytest.raises(UserError, match="leaves no room"):
        scheduler.add(seq("d", 3, max_total_tokens=3))
    assert scheduler.is_idle


def test_a_sequence_alone_runs_to_the_end_of_the_pool():
    scheduler = make(num_pages=4, max_context=64)
    alone = seq("a", 3)
    scheduler.add(alone)
    while not scheduler.is_idle:
        step(scheduler)
    assert alone.num_tokens == 16
    assert alone.num_preemptions == 0


def test_steps_cannot_overlap_and_need_their_tokens():
    scheduler = make()
    scheduler.add(seq("a", 3))
    plan = scheduler.next(0.0)
    assert plan is not None
    with pytest.raises(InternalError, match="was not committed"):
        scheduler.next(0.0)
    with pytest.raises(InternalError, match="no token was given"):
        scheduler.commit(plan, {})
    with pytest.raises(InternalError, match="not the one in flight"):
        scheduler.commit(plan, {"a": [1]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_tokens", 3),
        ("max_sequences", 0),
        ("prefill_chunk", 0),
        ("priority_step_s", -1),
        ("max_draft_rows", -1),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        make(**{name: value})


class Guess:
    """Always guesses the same."""

    def __init__(self, *drafts: int) -> None:
        self.drafts = list(drafts)
        self.told: list[tuple[str, int, int]] = []

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        return self.drafts[:limit]

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        self.told.append((seq_id, num_drafted, num_accepted))

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        pass

    def forget(self, seq_id: str) -> None:
        pass


def make_guessing(*drafts: int, num_pages: int = 64, **config: object) -> tuple[Scheduler, Guess]:
    scheduler = make(num_pages, **config)
    scheduler._drafter = guess = Guess(*drafts)
    return scheduler, guess


def test_a_decode_carries_drafts_and_only_accepted_ones_count():
    scheduler, guess = make_guessing(7, 8, 9)
    scheduler.add(seq("a", 3))
    assert step(scheduler) == [("a", 0, 3, True)]
    plan = scheduler.next(0.0)
    assert shape(plan) == [("a", 3, 4, True)]
    item = plan.sequences[0]  # type: ignore[union-attr]
    assert (item.drafts, item.num_logits, len(item.pages)) == ([7, 8, 9], 4, 2)
    scheduler.commit(plan, {"a": [7, 5]})  # type: ignore[arg-type]
    a = scheduler["a"]
    assert (a.output_ids, a.num_computed, len(scheduler.pages.pages_of("a"))) == ([0, 7, 5], 5, 2)
    assert guess.told == [("a", 3, 1)]
    assert scheduler.stats()[-3:] == (1, 3, 1)
    assert shape(scheduler.next(0.0)) == [("a", 5, 4, True)]


def test_pages_of_rejected_drafts_are_given_back():
    scheduler, _ = make_guessing(*range(7, 15))
    scheduler.add(seq("a", 3))
    step(scheduler)
    plan = scheduler.next(0.0)
    assert plan is not None
    assert len(plan.sequences[0].pages) == 3
    scheduler.commit(plan, {"a": [5]})
    assert scheduler.stats().pages_used == 2
    plan = scheduler.next(0.0)
    assert plan is not None
    scheduler.abandon(plan)
    assert scheduler.stats().pages_used == 2
    scheduler.validate()


def test_drafts_share_the_room_and_a_large_step_has_none():
    scheduler, _ = make_guessing(1, 2, 3, 4, 5, max_draft_rows=8)
    for name in "abc":
        scheduler.add(seq(name, 2))
    step(scheduler)
    assert [item[2] for item in step(scheduler)] == [3, 3, 2]
    scheduler.add(seq("long", 40))
    assert [item[2] for item in step(scheduler)] == [1, 1, 1, 13]


def test_drafts_take_no_page_that_others_may_need():
    for num_pages, num_tokens in ((4, 6), (3, 3)):  # the last free one stays; its own hold three
        scheduler, _ = make_guessing(1, 2, 3, 4, 5, num_pages=num_pages, max_context=12)
        scheduler.add(seq("a", 5))
        assert step(scheduler) == [("a", 0, 5, True)]
        assert step(scheduler) == [("a", 5, num_tokens, True)]


def test_tokens_that_do_not_follow_the_drafts_are_an_error():
    scheduler, _ = make_guessing(7, 8)
    scheduler.add(seq("a", 3))
    step(scheduler)
    plan = scheduler.next(0.0)
    assert plan is not None
    with pytest.raises(InternalError, match="do not follow drafts"):
        scheduler.commit(plan, {"a": [8, 5]})
