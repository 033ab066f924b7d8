"""Rows by number: nothing lost, nothing twice, the same for everybody."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import ConfigError, UserError
from mxn.models.chat_template import ChatTemplates
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data import IGNORED, DataSettings, Rows, TokenCache, prepare
from mxn.train.run.data import cache as caches
from mxn.train.run.data.order import shuffled
from mxn.train.run.data.packing import fit_rows, num_stream_rows, stream_row
from support.training import LLAMA, SHAKESPEARE

FIRST_EIGHT = (
    43,
    7,
    30,
    44,
    15,
    37,
    19,
    24,
)  # of 50 places; if it changes, resumed jobs see other rows
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def make_cache(lengths: list[int], targets: np.ndarray | None = None) -> TokenCache:
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.arange(1, starts[-1] + 1, dtype=np.uint16)
    return TokenCache(
        folder=Path("."), fingerprint="f", tokenizer="t", tokens=tokens, targets=targets,
        starts=starts,
    )  # fmt: skip


@given(count=st.integers(1, 300), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_a_shuffle_is_a_permutation(count, seed, epoch):
    order = [shuffled(place, count, seed=seed, epoch=epoch) for place in range(count)]
    assert sorted(order) == list(range(count))


def test_shuffles_differ_by_seed_and_epoch_and_are_fixed_for_all_time():
    orders = {
        key: tuple(shuffled(place, 50, seed=key[0], epoch=key[1]) for place in range(50))
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len(set(orders.values())) == 3
    assert orders[0, 0][:8] == FIRST_EIGHT
    with pytest.raises(IndexError):
        shuffled(50, 50, seed=0, epoch=0)


@given(lengths=LENGTHS, seq_tokens=st.integers(1, 17))
def test_a_stream_has_every_token_once_in_order(lengths, seq_tokens):
    cache = make_cache(lengths)
    rows = [
        stream_row(cache.starts, seq_tokens, row)
        for row in range(num_stream_rows(cache.starts, seq_tokens))
    ]
    seen = [
        int(cache.starts[p.document]) + p.first + i for row in rows for p in row
        for i in range(p.length)
    ]  # fmt: skip
    assert seen == list(range(sum(lengths)))
    assert all(sum(p.length for p in row) == seq_tokens for row in rows[:-1])


@given(lengths=LENGTHS, seq_tokens=st.integers(1, 50), packed=st.booleans())
def test_fitted_rows_hold_whole_documents_once(lengths, seq_tokens, packed):
    rows = fit_rows(np.array(lengths), seq_tokens, packed=packed)
    placed = [rows.row(number) for number in range(len(rows))]
    assert sorted(p.document for row in placed for p in row) == list(range(len(lengths)))
    for row in placed:
        assert sum(p.length for p in row) <= seq_tokens
        assert packed or len(row) == 1
        assert all(p.length == min(lengths[p.document] - 1, seq_tokens) for p in row)
    assert rows.num_cut == sum(length - 1 > seq_tokens for length in lengths)


def test_packing_leaves_little_room():
    lengths = np.random.default_rng(0).integers(20, 400, 2000)
    rows = fit_rows(lengths, 512)
    assert (lengths - 1).sum() / (len(rows) * 512) > 0.98


@settings(max_examples=30)
@given(lengths=LENGTHS, packing=st.sampled_from(["stream", "fit", "none"]), data=st.data())
def test_every_learned_token_is_predicted_once_from_the_one_before_it(lengths, packing, data):
    total = sum(lengths)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    targets[1] = True
    cache = make_cache(lengths, targets)
    rows = Rows(cache, seq_tokens=40, micro_batch=1, packing=packing, seed=3)
    predicted = []
    for index in range(rows.rows_per_epoch):
        batch = rows.micro_batch(index)
        counts = batch.labels[0] != IGNORED
        assert batch.num_tokens == int(counts.sum())
        assert torch.equal(batch.labels[0][counts], batch.ids[0][counts] + 1)
        predicted += (batch.labels[0][counts] - 1).tolist()
    first_of_document = set(cache.starts[:-1].tolist())
    want = [t for t in range(total) if targets[t] and t not in first_of_document]
    assert sorted(predicted) == want


def test_positions_and_segments_begin_anew_with_each_document():
    rows = Rows(make_cache([4, 3, 6]), seq_tokens=8, micro_batch=2, packing="stream", shuffle=False)
    batch = rows.micro_batch(0)
    assert batch.is_packed
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0] * 5 + [1] * 3]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.labels[0].tolist() == [2, 3, 4, IGNORED, 6, 7, IGNORED, 9]
    assert batch.ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.segments.dtype == torch.int32
    alone = Rows(make_cache([4, 3, 6]), seq_tokens=8, micro_batch=3, packing="none")
    assert not alone.micro_batch(0).is_packed


def test_the_order_of_rows_does_not_depend_on_the_micro_batch():
    cache = make_cache([7] * 23)
    small = Rows(cache, seq_tokens=6, micro_batch=1, seed=5)
    large = Rows(cache, seq_tokens=6, micro_batch=4, seed=5)
    assert small.fingerprint == large.fingerprint
    one_by_one = torch.cat([small.micro_batch(index).ids for index in range(80)])
    by_fours = torch.cat([large.micro_batch(index).ids for index in range(20)])
    assert torch.equal(one_by_one, by_fours)
    again = Rows(cache, seq_tokens=6, micro_batch=4, seed=5).micro_batch(13)
    assert torch.equal(again.ids, large.micro_batch(13).ids)
    assert Rows(cache, seq_tokens=6, micro_batch=1, seed=6).fingerprint != small.fingerprint


def test_epochs_follow_each_other_without_a_gap():
    rows = Rows(make_cache([7] * 5), seq_tokens=7, micro_batch=2, seed=1)
    assert rows.rows_per_epoch == 5
    assert rows.micro_batches_per_epoch == 3
    assert rows.num_steps(2, 1) == 5
    assert rows.num_steps(2, 2) == 3
    firsts = torch.cat([rows.micro_batch(index).ids for index in range(5)])[:, 0].tolist()
    assert sorted(firsts[:5]) == sorted(firsts[5:])
    assert firsts[:5] != firsts[5:]


def test_answers_behind_the_end_of_a_row_are_counted(caplog):
    targets = np.zeros(60, bool)
    targets[[5, 55]] = True
    rows = Rows(make_cache([10, 50], targets), seq_tokens=16, micro_batch=1)
    assert (rows.packing, rows.num_lost, rows.num_cut, rows.rows_per_epoch) == ("fit", 1, 1, 1)
    assert "1 of 2 documents are longer than a row of 16 tokens" in caplog.text
    targets[5] = False
    with pytest.raises(UserError, match="first 16 tokens"):
        Rows(make_cache([60], targets), seq_tokens=16, micro_batch=1)


def test_settings_that_cannot_be_are_refused():
    cache = make_cache([5])
    with pytest.raises(ConfigError, match="none of auto"):
        Rows(cache, seq_tokens=4, micro_batch=1, packing="tight")
    with pytest.raises(ConfigError, match="at least 1"):
        Rows(cache, seq_tokens=4, micro_batch=0)
    with pytest.raises(UserError, match="counted from 0"):
        Rows(cache, seq_tokens=4, micro_batch=1).micro_batch(-1)


@pytest.fixture
def tokenizer():
    return Tokenizer.load(LLAMA)


@pytest.fixture
def data_file(tmp_path):
    lines = [json.dumps({"text": f"line {n} of the play"}) for n in range(20)]
    lines[3] = "{broken"
    lines[5] = json.dumps({"prompt": "ROMEO:", "completion": " Ay me!"})
    file = tmp_path / "plays.jsonl"
    file.write_text("\n".join(lines))
    return file


def read(file: Path, tokenizer: Tokenizer, **options) -> TokenCache:
    settings = DataSettings(paths=(file,), **options)
    return prepare(settings, tokenizer, 1024, home=file.parent / "home")


def test_a_cache_is_made_once_and_belongs_to_its_content(data_file, tokenizer, monkeypatch):
    first = read(data_file, tokenizer)
    assert (first.num_documents, first.skipped.count) == (19, 1)
    assert first.tokens.dtype == np.uint16
    text = tokenizer.decode(first.tokens[: first.starts[1]].tolist())
    assert text == "line 0 of the play"

    def fail(*_args: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(caches, "read_documents", fail)
        again = read(data_file, tokenizer)
        moved = data_file.rename(data_file.with_name("moved.jsonl"))
        read(moved, tokenizer)
    assert again.skipped.describe() == "1 line skipped (plays.jsonl:4 is not JSON)"
    assert np.array_equal(again.tokens, first.tokens)
    assert np.array_equal(again.targets, first.targets)
    assert read(moved, tokenizer, learn="all").fingerprint != first.fingerprint
    with moved.open("a") as file:
        file.write('\n{"text": "more"}')
    assert read(moved, tokenizer).num_documents == 20


@pytest.mark.parametrize("harm", ["change", "cut", "remove", "manifest"])
def test_a_broken_cache_is_noticed_and_made_again(data_file, tokenizer, harm, caplog):
    cache = read(data_file, tokenizer)
    want = np.array(cache.tokens)
    path = cache.folder / ("cache.json" if harm == "manifest" else "tokens.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:20] if harm in ("cut", "manifest") else content)
    with pytest.raises(UserError, match="data cache"):
        caches.open_cache(cache.folder)
    assert np.array_equal(read(data_file, tokenizer).tokens, want)
    assert "tokenized again" in caplog.text


def test_a_cache_of_another_tokenizer_is_refused(data_file, tokenizer):
    cache = read(data_file, tokenizer)
    cache.check_tokenizer(tokenizer)
    other = Tokenizer.load(LLAMA.with_name("mxn-shakespeare-dsv3"))
    other.special_tokens["eos_token"] = "x"
    with pytest.raises(UserError, match="the model has tokenizer"):
        cache.check_tokenizer(other)


def test_a_cache_can_be_taken_elsewhere_by_models_with_the_same_tokenizer(data_file, tokenizer):
    made = read(data_file, tokenizer)
    folder = made.folder.rename(data_file.parent / "moved")
    settings = DataSettings(paths=(folder,))
    assert np.array_equal(prepare(settings, tokenizer, 1024).tokens, made.tokens)
    templates = tokenizer.templates.sources
    tokenizer.templates = ChatTemplates({"default": templates["default"] + " "})
    with pytest.raises(UserError, match=r"tokenizer \w{12}, the model has tokenizer \w{12}"):
        prepare(settings, tokenizer, 1024)


def test_data_with_nothing_to_learn_is_an_error_that_says_why(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"y": 2}\n')
    with pytest.raises(UserError, match=r"nothing to learn: 2 lines skipped \(a.jsonl:1 has"):
        read(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="nothing to learn: no line skipped"):
        read(tmp_path / "b.txt", tokenizer)
    assert not list((tmp_path / "home").iterdir())


def test_a_real_text_becomes_rows(tmp_path, tokenizer):
    file = tmp_path / "tiny.txt"
    file.write_text(SHAKESPEARE.read_text()[:20_000])
    rows = Rows(read(file, tokenizer), seq_tokens=64, micro_batch=2, pad_id=1)
    batch = rows.micro_batch(0)
    assert rows.packing == "stream"
    assert batch.shape == (2, 64)
    assert not batch.is_packed
    assert batch.num_tokens == 128
    text = tokenizer.decode(batch.ids[0].tolist())
    assert text in file.read_text()
