"""Guesses from the past: against a search written out, and when they stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.engine.draft import (
    LONGEST_MATCH,
    DraftLength,
    MtpDrafter,
    NgramDrafter,
    NgramIndex,
    RowCost,
)
from mxn.engine.sequence import Sequence

TOKENS = st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**32 - 1]), max_size=40)


def search(tokens: list[int]) -> tuple[int, int]:
    """The longest suffix that stood before, and what followed its last earlier occurrence."""
    for length in range(LONGEST_MATCH, 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:] and len(tokens) > length:
                return length, end
    return 0, 0


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 40), max_size=3))
def test_the_index_finds_what_a_search_finds_however_the_tokens_come(tokens, cuts):
    index, at = NgramIndex(), 0
    for cut in [*sorted(cuts), len(tokens)]:
        index.extend(tokens[at : max(at, cut)])
        at = max(at, min(cut, len(tokens)))
        assert index.match() == search(tokens[:at])
    assert len(index) == len(tokens)


def test_a_long_prompt_is_noted_over_several_steps(monkeypatch):
    """No step, for which all sequences wait, may take the time of all its tokens."""
    noted: list[int] = []
    extend = NgramIndex.extend

    def watched(index: NgramIndex, token_ids: list[int]) -> None:
        noted.append(len(token_ids))
        extend(index, token_ids)

    monkeypatch.setattr(NgramIndex, "extend", watched)
    seq, drafter = Sequence("a", list(range(10_000))), NgramDrafter(4)
    while not (drafts := drafter.propose(seq, 4)):
        seq.token_ids.append(seq.num_output)  # as the prompt began
        assert len(noted) < 20
    assert drafts == [len(noted) - 1 + i for i in range(4)]
    assert max(noted) <= 1024
    assert sum(noted) == len(seq.token_ids)


def test_a_continuation_past_the_end_goes_round():
    index = NgramIndex()
    index.extend([9, 1, 2, 1, 2, 1, 2])
    length, position = index.match()
    assert (length, position) == (3, 5)
    assert index.continuation(position, 5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("tokens", "limit", "want"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2]),  # three tokens match: all that is allowed
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([7, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5]),  # two match: two guesses
        ([7, 7, 3, 4, 5, 1, 2, 3], 9, [4]),
        ([1, 2, 3, 4], 9, []),
        ([1], 9, []),
    ],
)
def test_a_short_match_is_worth_a_short_guess(tokens, limit, want):
    assert NgramDrafter(4).propose(Sequence("a", tokens), limit) == want


def test_drafts_grow_while_all_come_true_and_shrink_to_what_did():
    length = DraftLength(8)
    length.observe(8, 2, 100, 0.1)
    assert length.length == 2
    length.observe(2, 2, 103, 0.1)
    assert length.length == 3
    for _ in range(9):
        length.observe(length.length, length.length, 110, 0.1)
    assert (length.length, length.resumes_at) == (8, 0)


@pytest.mark.parametrize("num_drafted", [1, 15, 16, 17, 32])
def test_no_draft_however_long_takes_the_rate_out_of_its_range(num_drafted):
    length = DraftLength(32)
    for num_accepted in (num_drafted, num_drafted, 0, num_drafted, 0, 0):
        before = length._rate
        length.observe(num_drafted, num_accepted, 100, 0.0)
        aim = num_accepted / num_drafted
        assert min(before, aim) < length._rate < max(before, aim)


def test_drafts_that_never_come_true_cost_little_and_ever_less():
    length, drafted_at = DraftLength(4), []
    for num_tokens in range(2000):
        if num_tokens >= length.resumes_at:
            length.observe(length.length, 0, num_tokens, 0.2)
            drafted_at.append(num_tokens)
    assert sum(at < 1000 for at in drafted_at) < 60
    assert sum(at >= 1000 for at in drafted_at) < 25
    assert drafted_at[-1] > 1000  # it keeps looking whether they pay by now


def test_a_drafter_stops_for_one_sequence_only_and_forgets():
    drafter = NgramDrafter(4)
    bad, good = Sequence("bad", [5] * 20), Sequence("good", [5] * 20)
    for _ in range(60):
        for seq, accepted in ((bad, 0), (good, 4)):
            if drafts := drafter.propose(seq, 4):
                drafter.observe(seq.seq_id, len(drafts), min(accepted, len(drafts)))
    assert drafter.propose(bad, 4) == []
    assert drafter.propose(good, 4) == [5] * 4
    drafter.forget("bad")
    drafter.forget("never seen")
    assert len(drafter) == 1


def test_the_cost_of_a_draft_is_measured_and_decides_what_pays():
    cost = RowCost()
    assert cost.pays_from(1) == pytest.approx(0.1)
    for _ in range(200):
        cost.observe(1, 0, 0.010)
        cost.observe(1, 4, 0.020)
        cost.observe(4, 0, 0.016)
    assert cost.value == pytest.approx(0.25, abs=1e-3)
    assert cost.pays_from(1) == pytest.approx(0.25, abs=1e-3)
    assert cost.pays_from(4) == 0.8  # a token is worth a quarter of a step; never quite hopeless
    cost.observe(1, 0, 99.0)  # the machine was asleep
    cost.observe(1, 1, 99.0)
    assert cost.value < 0.31
    for _ in range(200):
        cost.observe(4, 4, 0.016)
    assert cost.value < 1e-3
    assert cost.pays_from(4) == 0.05


def test_what_is_not_known_yet_is_no_measure():
    cost = RowCost()
    cost.observe(2, 4, 5.0)
    assert cost.value == RowCost().value


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("kind", ["ngram", "mtp"])
def test_where_every_step_has_drafts_a_few_go_without_so_that_the_cost_is_known(
    kind, num_sequences
):
    drafter = NgramDrafter(4) if kind == "ngram" else MtpDrafter(4, 16)
    seqs = [Sequence(str(i), [5] * 20) for i in range(num_sequences)]
    plain = []
    for step in range(400):
        drafts = []
        for seq in seqs:
            if isinstance(drafter, MtpDrafter):
                drafter.wanted(seq, len(seq.token_ids))
                drafter.offer(seq.seq_id, len(seq.token_ids), [5] * 4)
            if found := drafter.propose(seq, 4):
                drafts += found
                drafter.observe(seq.seq_id, len(found), len(found))
            seq.token_ids += [5] * (len(found) + 1)
        assert len(drafts) in (0, 4 * num_sequences)
        plain += [step] if not drafts else []
        drafter.observe_step(num_sequences, len(drafts), 0.010 * (1 + 0.25 * len(drafts)))
    assert drafter.cost.value == pytest.approx(0.25, abs=1e-3)
    assert sum(at < 30 for at in plain) == 3
    assert len(plain) == 5


def test_a_plain_step_that_brings_no_measure_keeps_no_draft_back_for_long():
    """A step beside a prompt is not observed: the drafts it was refused are spent."""
    drafter = NgramDrafter(4)
    seq = Sequence("a", [5] * 20)
    for _ in range(8):
        drafter.observe_step(1, 4, 0.010)
    assert drafter.propose(seq, 4) == []
    assert drafter.propose(seq, 4) == [5] * 4


@pytest.mark.parametrize(("step_s", "stays_on"), [(0.011, True), (0.030, False)])
def test_the_same_acceptance_pays_where_rows_are_cheap_and_not_where_they_are_dear(
    step_s, stays_on
):
    drafter, tokens, steps = NgramDrafter(4), [5] * 20, 0
    for _ in range(60):
        seq = Sequence("a", tokens)
        drafts = drafter.propose(seq, 4)
        drafter.observe_step(1, 0, 0.010)
        if drafts:
            steps += 1
            drafter.observe_step(1, len(drafts), 0.010 + (step_s - 0.010) * len(drafts) / 4)
            drafter.observe("a", len(drafts), 0 if steps % 3 else len(drafts))
        tokens = [*tokens, 5]
    assert (steps > 55) == stays_on
