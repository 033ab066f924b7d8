"""Long texts: the ids of short ones, no stall of other threads, and a bound before the work."""

from __future__ import annotations

import sys
import threading
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.models.test_tokenizer import byte_level_with_bos, metaspace, word_piece
from tokenizers import AddedToken, normalizers, pre_tokenizers

from mxn.models import tokenizer as module
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer

KINDS = {
    "byte-level": Tokenizer.from_tokenizers(byte_level_with_bos()),
    "metaspace": Tokenizer.from_tokenizers(metaspace()),
    "word-piece": Tokenizer.from_tokenizers(word_piece()),
    "shipped": Tokenizer.load(shipped_dir() / "mxn-shakespeare-llama"),
}
PIECES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["hello world ", "<s>", "<|im_end|>", "  ", "naïve 日本 ", "\u212a", "e\u0301"]
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(PIECES, max_size=8), times=st.sampled_from([1, 30, 300]), adds=st.booleans())
def test_a_batch_of_one_gives_the_ids_of_the_single_text(kind, pieces, times, adds):
    ours, text = KINDS[kind], "".join(pieces) * times
    raw = ours.raw
    single = raw.encode(text, add_special_tokens=adds)
    ids = ours.encode(text, adds)
    assert ids == single.ids
    assert ours.decode(ids, not adds) == raw.decode(ids, skip_special_tokens=not adds)
    pair = raw.encode(text, "the fox " * times)
    assert ours.encode_pair(text, "the fox " * times) == (pair.ids, pair.type_ids)
    assert ours.min_tokens(text) <= len(raw.encode(text, add_special_tokens=False).ids)
    offsets = raw.encode(text, add_special_tokens=False).offsets
    assert ours.truncate(text, 5) == (text[: offsets[4][1]] if len(offsets) > 5 else text)


def worst_stall_s(work) -> tuple[float, float]:
    """Return (how long `work` took, the longest time that another thread could not run)."""
    gaps, is_over = [0.0], threading.Event()

    def beat() -> None:
        while not is_over.is_set():
            begun_s = time.perf_counter()
            time.sleep(0.001)
            gaps.append(time.perf_counter() - begun_s)

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.02)
    begun_s = time.perf_counter()
    work()
    took_s = time.perf_counter() - begun_s
    is_over.set()
    thread.join()
    return took_s, max(gaps)


def test_a_long_text_leaves_other_threads_running():
    ours, text = KINDS["shipped"], "the quick brown fox jumps over it. " * 20_000
    held = worst_stall_s(lambda: ours.raw.encode(text))
    assert held[1] > held[0] / 2, "the library holds the GIL for one text, else this is needless"
    for work in (
        lambda: ours.encode(text),
        lambda: ours.encode_pair(text, "x"),
        lambda: ours.truncate(text, 100),
    ):
        took_s, stall_s = worst_stall_s(work)
        assert stall_s < max(0.1, took_s / 3), (took_s, stall_s)


def test_short_texts_take_no_detour(monkeypatch):
    ours = KINDS["shipped"]
    calls = []
    monkeypatch.setattr(module, "_BATCH_CHARS", 10)

    class Spy:
        def __getattr__(self, name: str):
            calls.append(name)
            return getattr(raw, name)

    raw, ours._backend.raw = ours._backend.raw, Spy()
    try:
        for text in ("a" * 9, "a" * 10):
            ours.encode(text)
    finally:
        ours._backend.raw = raw
    assert calls == ["encode", "encode_batch_fast"]


def test_the_bound_holds_for_every_character():
    raw = byte_level_with_bos()
    raw.normalizer = normalizers.NFC()
    ours = Tokenizer.from_tokenizers(raw)
    assert KINDS["shipped"].min_tokens("x" * 1000) >= 1
    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    assert max(len(c.encode()) / len(unicodedata.normalize("NFC", c).encode()) for c in chars) <= 3
    for text in ("\u212a" * 500, "\U0002f800" * 500, "\u1100\u1161\u11a8" * 500, " " * 5000):
        assert 0 < ours.min_tokens(text) <= len(ours.encode(text, False))


def test_no_bound_where_text_may_vanish():
    def bound(change) -> int:
        raw = byte_level_with_bos()
        change(raw)
        return Tokenizer.from_tokenizers(raw).min_tokens("a" * 10_000)

    assert KINDS["word-piece"].min_tokens(" " * 10_000) == 0
    assert bound(lambda raw: None) > 0

    def squeeze(raw) -> None:
        raw.normalizer = normalizers.Strip()

    def drop(raw) -> None:
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
        )

    def swallow(raw) -> None:
        raw.add_special_tokens([AddedToken("<mask>", lstrip=True)])

    assert [bound(change) for change in (squeeze, drop, swallow)] == [0, 0, 0]
