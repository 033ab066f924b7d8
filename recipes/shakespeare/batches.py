"""Which tokens a training step sees. A function of (seed, step) alone, so a resumed run sees the
same.

Two forms of the same text are mixed. *Raw*: the file as it is; a blank line ends a speech and the
next begins. *Dialogue*: `<|bos|>`, then speeches that each end with `<|eos|>` in place of the
blank line, which is what the chat template writes. So the model stops after a speech in a chat,
and goes on with the next speaker when it continues plain text.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from shakespeare.bpe import BOS, EOS
from shakespeare.corpus import speeches


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of `text`, int64 [tokens]."""
    return np.asarray(tokenizer.encode(text).ids, dtype=np.int64)


class Batches:
    """Rows of tokens for each step of a run."""

    def __init__(
        self, tokenizer: Tokenizer, text: str, *, seed: int, dialogue_share: float
    ) -> None:
        self._raw = encode(tokenizer, text)
        self._bos = tokenizer.token_to_id(BOS)
        parts = speeches(text)
        self._dialogue = encode(tokenizer, EOS.join(parts) + EOS)
        ends = np.flatnonzero(self._dialogue == tokenizer.token_to_id(EOS))
        self._speech_starts = np.concatenate(([0], ends[:-1] + 1))
        self._seed, self._dialogue_share = seed, dialogue_share
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    @property
    def tokens_per_epoch(self) -> int:
        return len(self._raw)

    def at(self, step: int, *, batch_tokens: int, row_tokens: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, int64 [batch_tokens / row_tokens, row_tokens]."""
        rows = batch_tokens // row_tokens
        rng = np.random.default_rng((self._seed, 1, step))
        is_dialogue = rng.random(rows) < self._dialogue_share
        made = [
            self._dialogue_row(rng, row_tokens + 1)
            if is_dialogue[r]
            else self._raw_row(step * rows + r, row_tokens + 1)
            for r in range(rows)
        ]
        batch = torch.from_numpy(np.stack(made))
        return batch[:, :-1], batch[:, 1:]

    def _raw_row(self, index: int, length: int) -> np.ndarray:
        per_epoch = (len(self._raw) - length) // length
        starts = self._permutation(index // per_epoch, length)
        start = starts[index % per_epoch]
        return self._raw[start : start + length]

    def _make_permutation(self, epoch: int, length: int) -> np.ndarray:
        """Window starts in random order; the cut points move from epoch to epoch."""
        rng = np.random.default_rng((self._seed, 2, epoch))
        per_epoch = (len(self._raw) - length) // length
        return rng.integers(length) + length * rng.permutation(per_epoch)

    def _dialogue_row(self, rng: np.random.Generator, length: int) -> np.ndarray:
        is_early = self._speech_starts + length <= len(self._dialogue)
        start = rng.choice(self._speech_starts[is_early])
        return np.concatenate(([self._bos], self._dialogue[start : start + length - 1]))
