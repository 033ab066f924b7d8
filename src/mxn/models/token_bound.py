"""How much text one token can stand for at most, so that hopeless texts need not be tokenized.

Reads the parts of a `tokenizers.Tokenizer`; a kind that may drop or shorten text without a limit,
such as WordPiece, has no bound. Knows no contexts and no requests. Start at `bytes_per_token`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from mxn.models.token_bytes import BYTE_LEVEL

# NFC makes at most one byte of three: U+212A, the sign for kelvin, becomes the letter K.
_NFC_SHRINKS = 3
# What keeps every character in some piece. Others are unknown here, or drop spaces.
_KEEPING = {"ByteLevel", "Digits", "Metaspace", "Split"}


def bytes_per_token(raw: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> int | None:
    """Return a number of bytes (UTF-8) that no token of `raw` exceeds; None: there is no limit.

    `vocab` is that of `raw` with its added tokens.
    """
    added = raw.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None  # such a token takes any number of spaces along
    shrinks = _normalizer_shrinks(raw)
    if shrinks is None or not _keeps_text(raw) or not _covers_bytes(raw, vocab):
        return None
    return shrinks * max((len(piece.encode()) for piece in vocab), default=1)


def _normalizer_shrinks(raw: tokenizers.Tokenizer) -> int | None:
    """Return the factor by which normalizing may shorten a text; None: any."""
    shrinks = 1
    for item in _parts(raw.normalizer, "normalizers"):
        kind = item.get("type")
        if kind == "NFC":
            shrinks *= _NFC_SHRINKS
        elif kind == "Replace":
            if item.get("pattern") != {"String": " "} or not item.get("content"):
                return None
        elif kind != "Prepend":
            return None
    return shrinks


def _keeps_text(raw: tokenizers.Tokenizer) -> bool:
    parts = _parts(raw.pre_tokenizer, "pretokenizers")
    return all(item.get("type") in _KEEPING and item.get("behavior") != "Removed" for item in parts)


def _covers_bytes(raw: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> bool:
    """Whether each byte has a token, so that nothing is dropped or joined as unknown."""
    if type(raw.model).__name__ != "BPE":
        return False
    if getattr(raw.model, "byte_fallback", False):
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    kinds = {item.get("type") for item in _parts(raw.pre_tokenizer, "pretokenizers")}
    return "ByteLevel" in kinds and all(char in vocab for char in BYTE_LEVEL)


def _parts(component: Any, key: str) -> list[dict[str, Any]]:
    """Return the leaves of a normalizer or pre-tokenizer as the library writes them down."""
    if component is None:
        return []
    return _flatten(json.loads(component.__getstate__()), key)


def _flatten(item: dict[str, Any], key: str) -> list[dict[str, Any]]:
    parts = item.get(key)
    return [item] if parts is None else [leaf for part in parts for leaf in _flatten(part, key)]
