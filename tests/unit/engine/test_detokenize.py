"""Streamed text equals the text of decoding at once, for real tokenizers and any chunking."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mxn.engine.detokenize import StopMatcher, StreamDetokenizer, byte_fallback_ids
from mxn.errors import InternalError, UserError
from mxn.models.token_bytes import BytePieces, is_bytes_only

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't matter, he said.",
    "Größe, naïve café, señor; 12345 and 67890 (a+b)*c == d",
    "你好，世界。今天天气很好，我们去公园吧。日本語のテキストもあります。",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 wave 👋🏽 heart ❤️‍🔥 done",
    "    indented code:\n\tif x:\n        return  y  # two  spaces",
] * 3
SPECIAL = ["<|end|>", "<|im_start|>", "<unk>"]
KINDS = ["byte_level", "bytes", "metaspace", "unigram", "wordpiece"]


class Decoder:
    """What `mxn.models.tokenizer.Tokenizer` does, counting the tokens it is made to decode."""

    def __init__(self, raw: Tokenizer) -> None:
        self.raw = raw
        self.byte_ids = byte_fallback_ids(raw.get_vocab())
        self.num_decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.num_decoded += len(ids)
        return self.raw.decode(ids, skip_special_tokens=skip_special_tokens)

    def ids(self, text: str) -> list[int]:
        return self.raw.encode(text, add_special_tokens=False).ids


class ByteDecoder(Decoder):
    """One that also tells the bytes of its tokens."""

    def byte_pieces(self, skip_special_tokens: bool) -> BytePieces:
        assert is_bytes_only(self.raw)
        added = self.raw.get_added_tokens_decoder()
        special = [key for key, token in added.items() if token.special]
        return BytePieces(self.raw.id_to_token, special if skip_special_tokens else ())


def _byte_level() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return raw


def _llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip


def _metaspace() -> Tokenizer:
    """The shape of Llama 2: BPE with byte fallback, one leading space stripped from the text."""
    letters = Tokenizer(models.BPE(unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    letters.train_from_iterator(CORPUS[:2], trainer)
    tokens = sorted(letters.get_vocab(), key=letters.token_to_id)
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = _llama_decoder()
    return raw


def _unigram() -> Tokenizer:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


def _wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["<unk>"], show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


@cache
def make(kind: str) -> Decoder:
    raw = _byte_level() if kind == "bytes" else globals()[f"_{kind}"]()
    raw.add_special_tokens(SPECIAL)
    raw.add_tokens([" an added token "])
    return ByteDecoder(raw) if kind == "bytes" else Decoder(raw)


def naive(decoder: Decoder, prompt: list[int], ids: list[int], *, skip: bool) -> str:
    """The text of `ids` behind `prompt`, decoded at once."""
    before, text = decoder.decode(prompt, skip), decoder.decode(prompt + ids, skip)
    same = 0
    while same < min(len(before), len(text)) and before[same] == text[same]:
        same += 1
    return text[same:]


def naive_stop(text: str, stops: Sequence[str], *, include: bool) -> tuple[str, str | None]:
    """Read character by character; of the stop strings that end at the first end, the longest."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def chunks_of(ids: list[int], seed: int) -> list[list[int]]:
    rng, chunks, start = random.Random(seed), [], 0
    while start < len(ids):
        size = rng.choice((1, 1, 1, 2, 5, 20))
        chunks.append(ids[start : start + size])
        start += size
    return chunks


def stream(decoder: Decoder, chunks: list[list[int]], **options: object) -> tuple[str, str | None]:
    detokenizer = StreamDetokenizer(decoder, byte_ids=decoder.byte_ids, **options)  # type: ignore[arg-type]
    deltas = [detokenizer.push(chunk)[0] for chunk in chunks]
    text, stop = detokenizer.finish()
    return "".join(deltas) + text, stop


TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(" ".join(CORPUS).split(" ")), max_size=20).map(" ".join),
    st.text(alphabet="👨‍👩‍👧🏽🇩🇪你好 a\u0301é\n", max_size=40),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_deltas_of_any_tokens_joined_are_the_text_decoded_at_once(kind, data):
    decoder = make(kind)
    vocab = decoder.raw.get_vocab_size()
    some = st.one_of(
        TEXTS.map(decoder.ids),
        st.lists(st.integers(0, vocab - 1), max_size=80),
        st.lists(st.sampled_from(sorted(decoder.byte_ids) or [0]), max_size=12),
        st.lists(st.integers(vocab - 4, vocab - 1), max_size=3),  # added and special tokens
    )
    ids = [token for part in data.draw(st.lists(some, max_size=5)) for token in part]
    prompt = decoder.ids(data.draw(TEXTS))
    skip = data.draw(st.booleans())
    chunks = chunks_of(ids, data.draw(st.integers(0, 99)))
    got, _ = stream(decoder, chunks, prompt_ids=prompt, skip_special_tokens=skip)
    assert got == naive(decoder, prompt, ids, skip=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_text_ends_at_the_first_stop_string_whatever_the_chunks(kind, data):
    decoder = make(kind)
    ids = decoder.ids(data.draw(TEXTS))
    text = decoder.decode(ids, True)
    part = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(
        lambda cut: text[cut[0] : cut[0] + cut[1]]
    )
    stops = data.draw(st.lists(st.one_of(part, st.text("ab .", max_size=3)), max_size=4))
    stops = [stop for stop in stops if stop]
    include = data.draw(st.booleans())
    chunks = chunks_of(ids, data.draw(st.integers(0, 99)))
    got = stream(decoder, chunks, stop=stops, include_stop_str=include)
    assert got == naive_stop(text, stops, include=include)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_shown_is_always_a_beginning_of_the_final_text(kind, data):
    decoder = make(kind)
    ids = decoder.ids(data.draw(TEXTS))
    stops = data.draw(st.lists(st.text("aeiou .你", min_size=1, max_size=4), max_size=3))
    final, _ = naive_stop(decoder.decode(ids, True), stops, include=False)
    detokenizer = StreamDetokenizer(decoder, stop=stops, byte_ids=decoder.byte_ids)
    shown = ""
    for token_id in ids:
        shown += detokenizer.push([token_id])[0]
        assert final.startswith(shown)


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.tuples(st.text("ab", max_size=4), st.booleans()), max_size=8),
)
def test_matcher_counts_only_ends_in_armed_pieces(stops, pieces):
    text = "".join(piece for piece, _ in pieces)
    armed = [flag for piece, flag in pieces for _ in piece]
    want = next(
        (
            (text[: end - len(stop)], stop)
            for end in range(1, len(text) + 1)
            for stop in sorted(stops, key=len, reverse=True)
            if armed[end - 1] and text[:end].endswith(stop)
        ),
        (text, None),
    )
    matcher, shown, hit = StopMatcher(stops), "", None
    for piece, is_armed in pieces:
        delta, hit = matcher.push(piece, is_armed=is_armed)
        shown += delta
        if hit:
            break
    assert (shown if hit else shown + matcher.flush(), hit) == want


@pytest.mark.parametrize("kind", ["byte_level", "bytes"])
def test_an_emoji_appears_only_when_its_last_byte_has_come(kind):
    decoder = make(kind)
    ids = decoder.ids("x👋")
    detokenizer = StreamDetokenizer(decoder)
    deltas = [detokenizer.push([token_id])[0] for token_id in ids]
    assert deltas[0] == "x"
    assert set(deltas[1:-1]) <= {""}
    assert deltas[-1] == "👋"


@pytest.mark.parametrize("kind", ["byte_level", "bytes"])
def test_an_incomplete_character_at_the_end_becomes_the_replacement_sign(kind):
    decoder = make(kind)
    ids = decoder.ids("ok 👋")[:-1]
    detokenizer = StreamDetokenizer(decoder)
    assert detokenizer.push(ids) == ("ok ", None)
    assert detokenizer.finish() == ("\ufffd", None)


@pytest.mark.parametrize("kind", ["byte_level", "bytes"])
def test_output_completes_a_character_that_the_prompt_began(kind):
    decoder = make(kind)
    *prompt, last = decoder.ids("say 👋")
    assert stream(decoder, [[last]], prompt_ids=prompt) == ("👋", None)


@pytest.mark.parametrize("kind", ["byte_level", "bytes"])
def test_a_character_that_the_prompt_began_and_nobody_ends_is_no_output(kind):
    decoder = make(kind)
    begun = decoder.ids("say 👋")[:-2]
    letter, stray = decoder.ids("x")[0], decoder.raw.token_to_id("Ģ")  # 0x80: never a beginning
    for ids in ([], [letter], [stray, letter], [stray, stray, stray, letter]):
        assert stream(decoder, [ids], prompt_ids=begun) == (
            naive(decoder, begun, ids, skip=True),
            None,
        )


def test_a_word_after_the_prompt_keeps_its_leading_space():
    decoder = make("metaspace")
    prompt, ids = decoder.ids("hello"), decoder.ids("world")
    assert stream(decoder, [ids], prompt_ids=prompt) == (" world", None)
    assert stream(decoder, [ids]) == ("world", None)


@pytest.mark.parametrize("kind", ["byte_level", "bytes"])
def test_the_beginning_of_a_stop_string_is_held_until_it_is_decided(kind):
    decoder = make(kind)
    detokenizer = StreamDetokenizer(decoder, stop=("###", "END"))
    assert detokenizer.push(decoder.ids("a #")) == ("a ", None)
    assert detokenizer.push(decoder.ids("# E")) == ("## ", None)
    assert detokenizer.push(decoder.ids("ND of it")) == ("", "END")
    assert detokenizer.push(decoder.ids("more")) == ("", "END")
    assert detokenizer.finish() == ("", "END")


def test_tokens_behind_a_stop_string_are_not_counted():
    decoder = make("byte_level")
    ids = [decoder.ids(char)[0] for char in "abcdef"]
    detokenizer = StreamDetokenizer(decoder, stop=["c"])
    detokenizer.push(ids)
    assert detokenizer.num_tokens == 3


def test_a_stop_string_before_min_tokens_does_not_count():
    decoder = make("byte_level")
    ids = [decoder.ids(char)[0] for char in "a.b.c."]
    for chunks in ([ids], [[token_id] for token_id in ids]):
        assert stream(decoder, chunks, stop=["."], min_tokens=3) == ("a.b", ".")
        assert stream(decoder, chunks, stop=["."], min_tokens=4) == ("a.b", ".")
        assert stream(decoder, chunks, stop=["."], min_tokens=5) == ("a.b.c", ".")


def test_work_per_token_does_not_grow_with_the_text():
    decoder = make("byte_level")
    ids = decoder.ids(" ".join(CORPUS)) * 4
    garbage = [decoder.raw.token_to_id("Ģ")] * 2000  # 0x80: never a character
    runes = decoder.ids("ᚠᛇᚻ𒀀" * 200)  # a token for each byte
    for tokens in (ids, garbage, runes, ids + garbage + runes + ids):
        decoder.num_decoded = 0
        stream(decoder, [tokens])
        assert decoder.num_decoded < 64 * len(tokens)


def test_bad_use_is_refused():
    decoder = make("byte_level")
    with pytest.raises(UserError, match="stop string is empty"):
        StreamDetokenizer(decoder, stop=["a", ""])
    detokenizer = StreamDetokenizer(decoder)
    detokenizer.finish()
    with pytest.raises(InternalError, match="finished"):
        detokenizer.push([1])
