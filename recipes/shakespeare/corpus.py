"""The public-domain text and its split. Knows characters and speeches; knows no tokens.

Start at `load_split`. The three pieces are contiguous and joined they are the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA_PATH = Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt"
HELDOUT_SHARE = 0.10
VALID_SHARE = 0.03
_SPEECH_END = "\n\n"


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Training text, the validation piece after it, and the held-out text at the end."""

    train: str
    valid: str
    heldout: str


def load_split(path: Path = DATA_PATH) -> TextSplit:
    """Return the split of the shipped text. Raises: FileNotFoundError if the file is missing."""
    return split_text(path.read_text(encoding="utf-8"))


def split_text(text: str) -> TextSplit:
    """Cut `text` at the first speech boundaries after 87 % and after 90 % of its characters."""
    valid_from = _boundary(text, int(len(text) * (1 - HELDOUT_SHARE - VALID_SHARE)))
    heldout_from = _boundary(text, int(len(text) * (1 - HELDOUT_SHARE)))
    return TextSplit(
        train=text[:valid_from],
        valid=text[valid_from:heldout_from],
        heldout=text[heldout_from:],
    )


def _boundary(text: str, start: int) -> int:
    found = text.find(_SPEECH_END, start)
    if found < 0:
        raise ValueError(f"no speech ends after character {start} of {len(text)}")
    return found + len(_SPEECH_END)


def speeches(text: str) -> list[str]:
    """Return the speeches of `text`, each with its speaker line and without the blank line."""
    return [speech for part in text.split(_SPEECH_END) if (speech := part.strip("\n"))]
