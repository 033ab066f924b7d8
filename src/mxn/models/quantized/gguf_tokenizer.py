"""The tokenizer that a GGUF file carries, as a `tokenizers.Tokenizer`. Knows no model.

Two kinds are known: "gpt2" (byte-level BPE with a merge list; how text is cut into words is named
by `tokenizer.ggml.pre`) and "llama" (SentencePiece BPE, whose merges follow from the scores).
Source: llama.cpp's llama-vocab.cpp for the names. Start at `read_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mxn.errors import UnsupportedError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type
_SPACE = "▁"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """How a byte-level tokenizer cuts text before merging."""

    pattern: str | None = None  # None: GPT-2's own rule
    is_digit_split: bool = False  # each digit alone, before anything else
    is_nfc: bool = False
    ignores_merges: bool = False  # a word that is a token is taken whole
    adds_bos: bool = False  # where the file does not say


_LLAMA3 = _Split(
    pattern=rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",
    ignores_merges=True,
    adds_bos=True,
)
_QWEN2 = _Split(
    pattern=rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}", is_nfc=True
)
_DIGITS = _Split(is_digit_split=True)
_SPLITS = {
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _Split(), "smollm": _DIGITS, "starcoder": _DIGITS,
    "refact": _DIGITS, "command-r": _DIGITS,
}  # fmt: skip


class _Vocabulary:
    """The token lists of the metadata, checked for equal lengths."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.tokens: list[str] = self._list("tokens", str, None)
        self.types: list[int] = self._list("token_type", int, 1)
        self.scores: list[float] = self._list("scores", (int, float), 0.0)
        self.merges: list[str] = self._list("merges", str, None)
        lengths = {len(self.tokens), len(self.types), len(self.scores)}
        if not self.tokens or len(lengths) > 1:
            raise UnsupportedError(
                f"{path}: its vocabulary has {len(self.tokens)} tokens, {len(self.types)} types and"
                f" {len(self.scores)} scores",
                hint=_BESIDE,
            )

        try:
            "".join(self.tokens).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnsupportedError(f"{path}: a token is no UTF-8: {error}", hint=_BESIDE) from error

    def _list(self, name: str, kind: Any, default: Any) -> list[Any]:
        """Return a list of the metadata; without it, `default` for each token, or nothing."""
        found = self.field(name)
        if found is None:
            return [] if default is None else [default] * len(self.tokens)
        if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
            raise UnsupportedError(f"{self.path}: its {name} are no list of {kind}", hint=_BESIDE)
        return found

    def field(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def ids(self) -> dict[str, int]:
        """Return token -> id of the tokens that can occur."""
        return {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != _UNUSED
        }

    def special(self, name: str) -> str | None:
        """Return the bos, eos, … token as text."""
        token_id = self.field(f"{name}_token_id")
        has_it = isinstance(token_id, int) and 0 <= token_id < len(self.tokens)
        return self.tokens[token_id] if has_it else None

    def added(self) -> list[AddedToken]:
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]


_BESIDE = "put the model's tokenizer.json (and tokenizer_config.json) beside the GGUF file"


def read_tokenizer(
    path: Path, metadata: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer and what tokenizer_config.json would hold, chat template included.

    Raises: UnsupportedError, asking for the tokenizer's files, when it cannot be rebuilt exactly.
    """
    vocabulary = _Vocabulary(path, metadata)
    kind = vocabulary.field("model", "none")
    if kind == "gpt2":
        raw, adds_bos = _byte_level(vocabulary)
    elif kind == "llama":
        raw, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise UnsupportedError(f"{path}: its tokenizer is of the kind {kind!r}", hint=_BESIDE)
    raw.add_tokens(vocabulary.added())
    raw.post_processor = _post_processor(vocabulary, adds_bos)
    names = ("bos", "eos", "unknown", "padding")
    special = dict(zip(("bos", "eos", "unk", "pad"), map(vocabulary.special, names), strict=True))
    config = {f"{name}_token": text for name, text in special.items() if text is not None}
    template = metadata.get("tokenizer.chat_template")
    return raw, config | ({"chat_template": template} if template else {})


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = str(vocabulary.field("pre", "unnamed"))
    if name not in _SPLITS:
        raise UnsupportedError(
            f"{vocabulary.path}: its tokenizer cuts words by the rule {name!r}; known are"
            f" {', '.join(_SPLITS)}",
            hint=_BESIDE,
        )
    split = _SPLITS[name]
    ids = vocabulary.ids()
    merges = [_merge(vocabulary.path, line, ids) for line in vocabulary.merges]
    raw = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, ignore_merges=split.ignores_merges)
    )
    if split.is_nfc:
        raw.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split.is_digit_split:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    return raw, split.adds_bos


def _merge(path: Path, line: str, ids: Mapping[str, int]) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    if left not in ids or right not in ids or left + right not in ids:
        raise UnsupportedError(f"{path}: {line!r} is no merge of two tokens", hint=_BESIDE)
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    ids = vocabulary.ids()
    unknown = vocabulary.special("unknown")
    raw = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in ids,
        )
    )
    has_prefix = bool(vocabulary.field("add_space_prefix", True))
    prepend = [normalizers.Prepend(_SPACE)] if has_prefix else []
    raw.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return raw


def _merges_by_score(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all ways to make a token of two others, the token of the highest score first.

    SentencePiece merges the adjacent pair whose union scores highest; a merge list does the same
    when it is in that order. Ties are the splits of one token: the longer left part first.
    """
    found = []
    for token, token_id in ids.items():
        if vocabulary.types[token_id] in (_CONTROL, _USER_DEFINED):
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[token_id], token_id, left, right))
    found.sort(key=lambda item: item[:2])  # stable: splits of one token stay in their order
    return [(left, right) for _, _, left, right in found]


def _post_processor(vocabulary: _Vocabulary, adds_bos: bool) -> processors.TemplateProcessing:
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    begins = bos is not None and vocabulary.field("add_bos_token", adds_bos)
    ends = eos is not None and vocabulary.field("add_eos_token", False)
    ids = {text: vocabulary.tokens.index(text) for text in (bos, eos) if text is not None}

    def sequence(letter: str, type_id: int) -> list[str]:
        parts = [f"{bos}:{type_id}"] if begins else []
        parts.append(f"${letter}:{type_id}")
        return [*parts, f"{eos}:{type_id}"] if ends else parts

    single = sequence("A", 0)
    return processors.TemplateProcessing(
        single=single, pair=[*single, *sequence("B", 1)], special_tokens=list(ids.items())
    )
