"""The exact bytes of single tokens, for log-probabilities. Knows spellings, no text rules.

Three spellings exist: `byte_level` (GPT-2: each byte is one printable character), `metaspace`
(SentencePiece: `▁` is a space, `<0xE2>` is a byte) and `wordpiece` (BERT: `##` continues a word).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's table of printable characters; printable bytes stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    table = {chr(byte): byte for byte in own}
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


BYTE_LEVEL = _byte_level_alphabet()


def detect_scheme(raw: tokenizers.Tokenizer) -> str:
    """Return how the vocabulary of `raw` spells bytes, read from its decoder."""
    kinds = _decoder_kinds(raw)
    if "ByteLevel" in kinds:
        return "byte_level"
    if "WordPiece" in kinds:
        return "wordpiece"
    return "metaspace" if kinds & {"Metaspace", "ByteFallback", "Replace"} else "plain"


def is_bytes_only(raw: tokenizers.Tokenizer) -> bool:
    """Return whether the text of tokens is just their bytes joined, with no rule beside."""
    return _decoder_kinds(raw) == {"ByteLevel"}


def _decoder_kinds(raw: tokenizers.Tokenizer) -> set[str | None]:
    decoder = raw.decoder
    # The decoder's own serialization is small; the whole tokenizer's may be tens of megabytes.
    text = "" if decoder is None else decoder.__getstate__().decode("utf-8")
    return {item.get("type") for item in _flatten(json.loads(text) if text else {})}


class BytePieces(dict[int, bytes]):
    """Token id → the bytes that the decoder `ByteLevel` makes of it, computed when asked for.

    For tokenizers of which `is_bytes_only` is true. `skipped_ids` have no bytes.
    """

    def __init__(
        self, spell: Callable[[int], str | None], skipped_ids: Collection[int] = ()
    ) -> None:
        super().__init__((token_id, b"") for token_id in skipped_ids)
        self._spell = spell

    def __missing__(self, token_id: int) -> bytes:
        piece = self._spell(token_id) or ""
        known = [BYTE_LEVEL.get(char) for char in piece]
        # A piece with any other character, such as a space, is taken as it is.
        found = (
            piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        )
        self[token_id] = found
        return found


def _flatten(item: dict) -> list[dict]:
    parts = item.get("decoders")
    return [item] if parts is None else [leaf for part in parts for leaf in _flatten(part)]


class ByteTable:
    """Token id → bytes, computed once for each id that is asked for."""

    def __init__(self, scheme: str, verbatim_ids: frozenset[int]) -> None:
        self._scheme = scheme
        self._verbatim_ids = verbatim_ids  # added tokens are spelled as they are
        self._known: dict[int, bytes] = {}

    def lookup(self, token_id: int, spell: Callable[[int], str | None]) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._compute(token_id, spell(token_id))
        return found

    def _compute(self, token_id: int, piece: str | None) -> bytes:
        if piece is None:
            return b""
        if token_id in self._verbatim_ids:
            return piece.encode()
        if self._scheme == "byte_level":
            if all(char in BYTE_LEVEL for char in piece):
                return bytes(BYTE_LEVEL[char] for char in piece)
            return piece.encode()
        if self._scheme == "wordpiece":
            return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
        if self._scheme == "metaspace":
            match = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()
        return piece.encode()
