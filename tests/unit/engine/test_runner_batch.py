"""The tensors of a step, position by position, against the definition written out in loops."""

from __future__ import annotations

import random

import pytest
import torch

from mxn.engine.stepbatch import Chunk, PageRows, pack

PAGE = 4


def filled(rng, lengths: list[int]) -> tuple[PageRows, list[list[int]]]:
    """Return page rows of sequences with so many tokens, on pages in random order."""
    order = list(range(100))
    rng.shuffle(order)
    rows, pages = PageRows(len(lengths), 32), []
    for length in lengths:
        row = rows.take()
        pages.append([order.pop() for _ in range(-(-length // PAGE))])
        rows.update(row, pages[-1])
    return rows, pages


@pytest.mark.parametrize("is_decode", [True, False])
def test_every_token_gets_its_position_slot_and_pages(is_decode):
    rng = random.Random(5)
    lengths = [rng.randint(1, 30) for _ in range(7)]
    rows, pages = filled(rng, lengths)
    new = [1 if is_decode else rng.randint(1, length) for length in lengths]
    table_rows = list(rows._filled)
    chunks = [
        Chunk(row, length - n, [rng.randrange(99) for _ in range(n)], 1)
        for row, length, n in zip(table_rows, lengths, new, strict=True)
    ]
    batch = pack(chunks, rows, PAGE, torch.device("cpu"))
    positions, slots, starts = [], [], [0]
    for chunk, own in zip(chunks, pages, strict=True):
        for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
            positions.append(position)
            slots.append(own[position // PAGE] * PAGE + position % PAGE)
        starts.append(len(positions))
    attention = batch.attention
    assert batch.token_ids_T.tolist() == [i for chunk in chunks for i in chunk.token_ids]
    assert batch.positions_T.tolist() == positions
    assert attention.slots_T.tolist() == slots
    assert attention.query_starts == attention.query_starts_S1.tolist() == starts
    assert attention.context_lens == attention.context_lens_S.tolist() == lengths
    assert attention.is_decode == is_decode
    for row, own in zip(attention.page_table_SP.tolist(), pages, strict=True):
        assert row[: len(own)] == own
        assert set(row[len(own) :]) <= {0}
    if is_decode:
        assert batch.logits_rows_R is None
    else:
        assert batch.logits_rows_R.tolist() == [end - 1 for end in starts[1:]]


def test_wanted_logits_are_the_last_rows_of_each_chunk():
    rows = PageRows(3, 4)
    chunks = [Chunk(rows.take(), 0, [1] * 5, n) for n in (0, 1, 3)]
    batch = pack(chunks, rows, PAGE, torch.device("cpu"))
    assert batch.logits_rows_R.tolist() == [9, 12, 13, 14]


def test_no_wanted_logits_is_an_empty_list_and_not_all():
    rows = PageRows(1, 4)
    batch = pack([Chunk(rows.take(), 0, [1] * 5, 0)], rows, PAGE, torch.device("cpu"))
    assert batch.logits_rows_R.tolist() == []


@pytest.mark.parametrize("num_logits", range(7))
def test_a_split_chunk_wants_the_same_logits_together(num_logits):
    first, rest = Chunk(0, 10, list(range(6)), num_logits).split(2)
    assert (first.token_ids, rest.token_ids) == ([0, 1], [2, 3, 4, 5])
    assert (first.start, rest.start) == (10, 12)
    assert first.num_logits + rest.num_logits == num_logits
    assert rest.num_logits == min(4, num_logits)


def test_a_reused_row_forgets_the_pages_of_the_sequence_before():
    rows = PageRows(1, 8)
    row = rows.take()
    rows.update(row, [5, 6, 7])
    rows.release(row)
    assert rows.num_used == 0
    again = rows.take()
    rows.update(again, [9])
    batch = pack([Chunk(again, 0, [1, 2], 1)], rows, PAGE, torch.device("cpu"))
    assert batch.attention.page_table_SP.tolist() == [[9]]


def test_parts_of_the_buffer_are_aligned_for_kernels_that_read_vectors():
    rows = PageRows(2, 4)
    chunks = [Chunk(rows.take(), 0, [1, 2, 3], 1) for _ in range(2)]
    batch = pack(chunks, rows, PAGE, torch.device("cpu"))
    start = batch.token_ids_T.data_ptr()
    for tensor in (batch.positions_T, batch.attention.slots_T, batch.attention.page_table_SP):
        assert (tensor.data_ptr() - start) % 128 == 0


@pytest.mark.parametrize(
    ("updates", "first"),
    [
        ([[7]], 7),
        ([[7, 8], [7, 8, 9]], 7),
        ([[7, 8], [7, 8, 11]], -1),
        ([[3, 2]], -1),
        ([[5], [5, 6], [5, 6, 9], [5, 6, 9, 10]], -1),
        ([[0, 1, 2]], 0),
    ],
)
def test_a_row_is_a_run_only_while_its_pages_follow_each_other(updates, first):
    rows = PageRows(2, 8)
    row = rows.take()
    for pages in updates:
        rows.update(row, pages)
    assert rows.run_start(row) == first
    rows.release(row)
    again = rows.take()
    rows.update(again, [4])
    assert rows.run_start(again) == 4


def test_a_row_that_was_cut_takes_other_pages_of_the_same_number():
    rows = PageRows(1, 8)
    row = rows.take()
    rows.update(row, [4, 5, 7])
    assert rows.run_start(row) == -1
    rows.cut(row, 5)
    assert rows.run_start(row) == -1
    rows.cut(row, 2)
    assert rows.run_start(row) == 4
    rows.update(row, [4, 5, 6])
    assert rows.table[row, :3].tolist() == [4, 5, 6]
    assert rows.run_start(row) == 4
    rows.cut(row, 0)
    rows.update(row, [4, 5, 9])
    assert rows.run_start(row) == -1


def test_a_chunk_without_its_last_tokens_wants_fewer_logits():
    chunk = Chunk(0, 10, list(range(6)), 4).without_last(3)
    assert (chunk.start, chunk.token_ids, chunk.num_logits) == (10, [0, 1, 2], 1)
