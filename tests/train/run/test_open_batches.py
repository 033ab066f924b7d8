"""Micro-batches that nobody owns are each done once, and training is that of one device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.errors import InternalError, PeerError
from mxn.train.plan.plan import Chunk, Stage
from mxn.train.run.open_batches import Sharing, can_be_open, is_worth, owned
from support import parity_cases
from support.parity_cases import plan_of
from support.ranks import run_ranks

WHOLE = [(0, 6)]
CASE = "support.parity_cases:train"
STEPS = 8


class Counter:
    """The part of a store that is used."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, key: str, number: int) -> int:
        self.numbers[key] = self.numbers.get(key, 0) + number
        return self.numbers[key]

    def delete_key(self, key: str) -> bool:
        return self.numbers.pop(key, None) is not None


def sharings(counts, share, store):
    bridges = [SimpleNamespace(rank=rank, store=store) for rank in range(len(counts))]
    return [Sharing(bridge, bridge.rank, counts, open_share=share) for bridge in bridges]


@st.composite
def steps(draw):
    counts = tuple(draw(st.lists(st.integers(1, 40), min_size=2, max_size=6)))
    each_s = draw(st.lists(st.floats(0.01, 10), min_size=len(counts), max_size=len(counts)))
    return counts, draw(st.floats(0, 0.9)), each_s


@given(steps())
def test_whatever_the_speeds_each_micro_batch_is_done_once(step):
    counts, share, each_s = step
    store = Counter()
    ranks = sharings(counts, share, store)
    for rank in ranks:
        rank.note(each_s, (1,) * len(counts))
    takes = [rank.begin(0) for rank in ranks]
    places = [
        rank.place_of(at)
        for rank, own in zip(ranks, ranks[0].owned, strict=True)
        for at in range(own)
    ]
    clocks = [own * seconds for own, seconds in zip(ranks[0].owned, each_s, strict=True)]
    at_work = [number for number, take in enumerate(takes) if take is not None]
    while at_work:
        soonest = min(at_work, key=lambda number: clocks[number])
        take = takes[soonest]
        assert take is not None
        number = take()
        if number is None:
            at_work.remove(soonest)
            continue
        places.append(ranks[soonest].place_of(number))
        clocks[soonest] += each_s[soonest]
    assert sorted(places) == list(range(sum(counts)))
    assert share > 0 or takes == [None] * len(counts)


@given(st.integers(1, 200), st.lists(st.floats(0.01, 10), min_size=2, max_size=8))
def test_the_quickest_never_leaves_one(left, each_s):
    assert is_worth(left, each_s, each_s.index(min(each_s)))
    assert not is_worth(0, each_s, 0)


def test_a_slow_one_takes_none_that_it_would_end_too_late_with():
    each_s = (1.0, 8.0)
    worth = [left for left in range(1, 40) if is_worth(left, each_s, 1)]
    assert worth == list(range(worth[0], 40))
    assert worth[0] == 12  # 13.3 s from now on, when the other one has done 12 and a half


def test_equal_ones_take_what_there_is():
    assert all(is_worth(1, (1.0,) * 1000, rank) for rank in (0, 500, 999))


def test_each_pipeline_keeps_at_least_one():
    assert owned((10, 3, 1), 0.5) == (5, 2, 1)
    assert owned((1, 1), 0.9) == (1, 1)
    assert owned((10, 3), 0.0) == (10, 3)


def test_an_old_counter_goes_when_the_next_step_begins():
    store = Counter()
    ranks = sharings((4, 4), 0.5, store)
    for step in range(3):
        takes = [rank.begin(step) for rank in ranks]
        for take in takes:
            assert take is not None
            take()
    assert list(store.numbers) == ["open/2"]


def test_a_step_in_which_one_stood_still_changes_no_decision():
    """Two of four ranks were stopped for minutes once: the others then took what was theirs."""
    rank = sharings((4, 4), 0.5, Counter())[0]
    for busy_s in ([4.0, 4.0], [4.0, 4.0], [400.0, 4.0]):
        rank.note(busy_s, (4, 4))
    take = rank.begin(0)
    assert take is not None
    assert take() == 2


def test_a_step_that_was_not_done_whole_is_an_error():
    rank = sharings((4, 4), 0.5, Counter())[0]
    assert rank.check([3, 5]) == (3, 5)
    with pytest.raises(InternalError, match=r"\(3, 4\) micro-batches of a step that has 8"):
        rank.check([3, 4])


def test_a_counter_that_is_gone_is_a_lost_peer():
    def fail(*_):
        raise RuntimeError("connection reset")

    bridge = SimpleNamespace(
        rank=0,
        store=SimpleNamespace(add=fail),
        lost=lambda what, begin_s, error: PeerError(f"lost {what}: {error}", rank=-1),
    )
    take = Sharing(bridge, 0, (4, 4), open_share=0.5).begin(0)  # type: ignore[arg-type]
    assert take is not None
    with pytest.raises(PeerError, match="lost a micro-batch"):
        take()


def test_only_pipelines_of_one_rank_can_do_one_more():
    plan = plan_of((5, [WHOLE]), (3, [WHOLE]))
    assert can_be_open(plan)
    assert not can_be_open(plan_of((8, [WHOLE])))
    assert not can_be_open(plan_of((5, [WHOLE]), (3, [[(0, 3)], [(3, 6)]])))
    wide = replace(
        plan.pipelines[0],
        stages=(Stage(group="all", first_device=0, chunks=(Chunk(first=0, end=6),), tp=2),),
    )
    assert not can_be_open(replace(plan, pipelines=(wide, plan.pipelines[1])))
    # Its last action is half a backward pass: one more behind it was a KeyError.
    assert not can_be_open(replace(plan, schedule="zero-bubble"))
    assert can_be_open(replace(plan, schedule="gpipe"))


@pytest.mark.parametrize("slow", [0, 1, None])
def test_training_is_that_of_one_device_whoever_does_what(slow):
    """One rank is made slow: the other does more of the step than was planned for it."""
    plan = plan_of((8, [WHOLE]), (8, [WHOLE]))
    one = parity_cases.single(STEPS, 16)
    arguments = {
        "plan": plan.to_json(), "steps": STEPS, "model": str(parity_cases.small_model()),
        "open_share": 0.75, "slow_rank": slow,
    }  # fmt: skip
    ranks = run_ranks(CASE, ["cpu", "cpu"], arguments)
    assert ranks[0]["loss"] == ranks[1]["loss"] == pytest.approx(one["loss"], rel=2e-5)
    assert ranks[0]["digests"] == ranks[1]["digests"]
    done = ranks[0]["done"]
    assert done == ranks[1]["done"]
    assert all(sum(step) == 16 for step in done)
    if slow is not None:
        assert all(step[slow] < step[1 - slow] for step in done[1:])
