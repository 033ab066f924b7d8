"""The page table alone: contents found again, references, eviction, contiguous runs."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mxn.engine.kvcache import PageTable, num_runs
from mxn.engine.pageruns import PageRuns
from mxn.errors import InternalError


def fill(table: PageTable, seq_id: str, tokens: list[int], salt: bytes = b"") -> int:
    """Allocate, pretend to compute, commit; return the tokens that came from the cache."""
    keys = table.make_keys(salt)
    matched = table.match_prefix(tokens, keys)
    assert table.allocate(seq_id, tokens, keys, num_matched=matched)
    table.commit(seq_id, tokens, len(tokens))
    table.validate()
    return matched * table.page_tokens


def test_a_prefix_is_found_page_by_page_and_shared():
    table = PageTable(10, 4)
    tokens = list(range(10))
    assert fill(table, "a", tokens) == 0
    assert fill(table, "b", [*tokens[:9], 99]) == 8
    assert table.pages_of("a")[:2] == table.pages_of("b")[:2]
    assert table.pages_of("a")[2] != table.pages_of("b")[2]
    assert table.pages_used == 4


def test_the_last_token_is_computed_even_when_all_pages_are_cached():
    table = PageTable(10, 4)
    tokens = list(range(8))
    fill(table, "a", tokens)
    assert fill(table, "b", tokens) == 4
    assert fill(table, "c", [*tokens, 8]) == 8


def test_equal_tokens_behind_different_tokens_are_not_the_same_content():
    table = PageTable(10, 2)
    fill(table, "a", [1, 1, 7, 7, 0])
    assert fill(table, "b", [2, 2, 7, 7, 0]) == 0


def test_salt_keeps_contents_apart():
    table = PageTable(10, 2)
    fill(table, "a", [1, 2, 3], salt=b"adapter")
    assert fill(table, "b", [1, 2, 3]) == 0
    assert fill(table, "c", [1, 2, 3], salt=b"adapter") == 2


def test_pages_are_found_only_after_their_commit():
    table = PageTable(10, 2)
    tokens = [1, 2, 3, 4, 5]
    keys, other = table.make_keys(), table.make_keys()
    table.match_prefix(tokens, keys)
    assert table.allocate("a", tokens, keys)
    assert table.match_prefix(tokens, other) == 0
    assert table.is_pending(other, 0)
    table.commit("a", tokens, 3)
    assert table.match_prefix(tokens, other) == 1
    assert table.is_pending(other, 1)
    table.free("a")
    assert not table.is_pending(other, 1)


def test_a_duplicate_stays_private_and_becomes_blank():
    table = PageTable(10, 2)
    tokens = [1, 2, 3]
    for seq_id in "ab":  # both before the commit of the other
        assert table.allocate(seq_id, tokens, table.make_keys())
    for seq_id in "ab":
        table.commit(seq_id, tokens, 3)
    assert not set(table.pages_of("a")) & set(table.pages_of("b"))
    table.free("a")
    table.free("b")
    table.validate()
    assert table.pages_cached == 1
    assert table.pages_free == 10


def test_the_least_recently_used_prefix_is_evicted_from_its_end():
    table = PageTable(4, 2)
    fill(table, "old", [1, 1, 2, 2, 0])
    table.free("old")
    fill(table, "big", [3, 3, 4, 4, 5])  # 3 pages: one blank, one never cached, one evicted
    table.free("big")
    keys = table.make_keys()
    assert table.match_prefix([1, 1, 2, 2, 0], keys) == 1
    table.validate()


def test_using_a_prefix_keeps_it_from_eviction():
    table = PageTable(4, 2)
    for first in (1, 2):
        fill(table, "x", [first, first, 0])
        table.free("x")
    fill(table, "again", [1, 1, 9])
    table.free("again")
    fill(table, "big", [7] * 5)
    assert table.match_prefix([1, 1, 0], table.make_keys()) == 1
    assert table.match_prefix([2, 2, 0], table.make_keys()) == 0


def test_nothing_changes_when_pages_do_not_suffice():
    table = PageTable(4, 2)
    fill(table, "a", [1, 1, 2, 2, 3])
    tokens = [1, 1, 2, 2, 5, 6, 7]
    keys = table.make_keys()
    matched = table.match_prefix(tokens, keys)
    assert not table.allocate("b", tokens, keys, num_matched=matched)
    assert not table.allocate("b", tokens[:5], keys, num_matched=matched, keep_free=1)
    assert not table.grow("a", 9)
    table.validate()
    assert (table.pages_used, table.pages_free) == (3, 1)
    assert table.allocate("b", tokens[:5], keys, num_matched=matched)


def test_prefix_caching_off_shares_nothing():
    table = PageTable(8, 2, prefix_caching=False)
    assert fill(table, "a", [1, 2, 3]) == 0
    assert fill(table, "b", [1, 2, 3]) == 0
    table.free("a")
    assert table.pages_cached == 0


def test_sequences_that_grow_side_by_side_stay_contiguous():
    table = PageTable(256, 4)
    ids = [f"s{n}" for n in range(8)]
    for seq_id in ids:
        assert table.allocate(seq_id, [0] * 10)
    for num_tokens in range(11, 100):
        for seq_id in ids:
            assert table.grow(seq_id, num_tokens)
    table.validate()
    assert [num_runs(table.pages_of(seq_id)) for seq_id in ids] == [1] * 8


def test_a_sequence_cannot_hold_pages_twice():
    table = PageTable(4, 2)
    table.allocate("a", [1])
    with pytest.raises(InternalError, match="already holds"):
        table.allocate("a", [1])


def test_validate_notices_a_leak_and_a_page_held_twice():
    table = PageTable(4, 2)
    table.allocate("a", [1, 2, 3])
    table._holdings["a"].pages.append(table.pages_of("a")[0])
    with pytest.raises(InternalError, match="references"):
        table.validate()
    other = PageTable(4, 2)
    other._blank.take(1)
    with pytest.raises(InternalError, match="blank"):
        other.validate()


class RunsMachine(RuleBasedStateMachine):
    """`PageRuns` against a plain set."""

    def __init__(self):
        super().__init__()
        self.runs, self.model, self.out = PageRuns(24), set(range(24)), []

    @rule(num_pages=st.integers(0, 8), after=st.none() | st.integers(0, 23))
    def take(self, num_pages, after):
        if num_pages > len(self.model):
            with pytest.raises(InternalError, match="wanted"):
                self.runs.take(num_pages)
            return
        if after in self.model:
            after = None
        taken = self.runs.take(num_pages, after=after)
        assert len(taken) == len(set(taken)) == num_pages
        assert set(taken) <= self.model
        if after is not None and after + 1 in self.model and taken:
            assert taken[0] == after + 1
        self.model -= set(taken)
        self.out += taken

    @rule(data=st.data())
    def give(self, data):
        pages = data.draw(st.lists(st.sampled_from(self.out), unique=True)) if self.out else []
        self.runs.give(pages)
        self.model |= set(pages)
        self.out = [page for page in self.out if page not in self.model]

    @invariant()
    def equals_the_set(self):
        self.runs.validate()
        assert set(self.runs) == self.model
        assert self.runs.num_pages == len(self.model)


TestRunsMachine = RunsMachine.TestCase
TestRunsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
