"""Rows of a job by their number: the same ones for any plan, at any time, on any rank.

A step takes the next rows of the shuffled order; epochs follow each other without a gap. Knows no
files and no ranks. Start at `Rows.micro_batch`.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

import numpy as np
import torch

from mxn.errors import ConfigError, UserError
from mxn.train.run.data.batch import IGNORED, MicroBatch
from mxn.train.run.data.cache import TokenCache
from mxn.train.run.data.order import shuffled
from mxn.train.run.data.packing import Piece, fit_rows, num_stream_rows, stream_row

log = logging.getLogger("mxn.train")

Packing = Literal["auto", "stream", "fit", "none"]
PACKINGS: tuple[Packing, ...] = ("auto", "stream", "fit", "none")


class Rows:
    """The rows of a data set, `seq_tokens` long, in groups of `micro_batch`."""

    def __init__(
        self,
        cache: TokenCache,
        *,
        seq_tokens: int,
        micro_batch: int,
        seed: int = 0,
        packing: Packing = "auto",
        shuffle: bool = True,
        pad_id: int = 0,
    ) -> None:
        """`packing`: ``stream`` lays documents end to end and cuts every row full; ``fit`` puts
        whole documents together where they fit; ``none`` gives each a row; ``auto`` is stream
        where all is learned, else fit.
        """
        if packing not in PACKINGS:
            raise ConfigError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
        if seq_tokens < 1 or micro_batch < 1:
            raise ConfigError(
                f"seq_tokens and micro_batch must be at least 1, got {seq_tokens}, {micro_batch}"
            )
        self.cache = cache
        self.seq_tokens, self.row_count = seq_tokens, micro_batch
        self._seed, self._shuffle, self._pad_id = seed, shuffle, pad_id
        if packing == "auto":
            packing = "stream" if cache.targets is None else "fit"
        self.packing: Packing = packing
        self._fitted = None
        self.num_lost = 0  # documents whose answer lies behind the end of a row
        if packing != "stream":
            lost = _lost(cache, seq_tokens)
            self.num_lost = len(lost)
            self._fitted = fit_rows(
                cache.lengths, seq_tokens, packed=packing == "fit", without=lost
            )
            if not len(self._fitted):
                raise UserError(
                    f"no document has anything to learn in its first {seq_tokens} tokens",
                    hint="longer rows (seq_tokens)",
                )
        if self.num_cut:
            log.warning(
                "%d of %d documents are longer than a row of %d tokens and lose their end;"
                " %d of them are left out, as nothing to learn is before it",
                self.num_cut, cache.num_documents, seq_tokens, self.num_lost,
            )  # fmt: skip
        self.rows_per_epoch = (
            num_stream_rows(cache.starts, seq_tokens) if self._fitted is None else len(self._fitted)
        )

    @property
    def micro_batches_per_epoch(self) -> int:
        """How many hold every row once; the last of them may begin the next epoch."""
        return -(-self.rows_per_epoch // self.row_count)

    @property
    def num_cut(self) -> int:
        """Documents longer than a row, which lost their end (never with ``stream``)."""
        return self._fitted.num_cut if self._fitted else 0

    @property
    def fingerprint(self) -> str:
        """Equal: the same rows in the same order, whatever the size of a micro-batch."""
        parts = (self.cache.fingerprint, self.seq_tokens, self._seed, self.packing, self._shuffle)
        return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()

    def num_steps(self, epochs: float, micro_batches: int) -> int:
        """Return how many steps of so many micro-batches show all rows `epochs` times."""
        rows = self.rows_per_epoch * epochs
        return max(1, int(np.ceil(rows / (self.row_count * micro_batches))))

    def micro_batch(self, index: int) -> MicroBatch:
        """Return micro-batch `index` of the job, counted from its first step, on the host."""
        if index < 0:
            raise UserError(f"micro-batches are counted from 0, got {index}")
        first = index * self.row_count
        rows = [self._fill(self._row(first + place)) for place in range(self.row_count)]
        ids, labels, positions, segments, counts = zip(*rows, strict=True)
        return MicroBatch(
            ids=torch.from_numpy(np.stack(ids)),
            labels=torch.from_numpy(np.stack(labels)),
            positions=torch.from_numpy(np.stack(positions)),
            segments=torch.from_numpy(np.stack(segments)),
            num_tokens=int(sum((row != IGNORED).sum() for row in labels)),
            is_packed=max(counts) > 1,
        )

    def _row(self, number: int) -> list[Piece]:
        """Return the pieces of the `number`-th row of the job, over all epochs."""
        epoch, place = divmod(number, self.rows_per_epoch)
        row = place
        if self._shuffle:
            row = shuffled(place, self.rows_per_epoch, seed=self._seed, epoch=epoch)
        if self._fitted is not None:
            return self._fitted.row(row)
        return stream_row(self.cache.starts, self.seq_tokens, row)

    def _fill(
        self, pieces: list[Piece]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Return ids, labels, positions and segments [T], and the number of documents."""
        length = self.seq_tokens
        ids = np.full(length, self._pad_id, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        positions = np.zeros(length, np.int64)
        segments = np.zeros(length, np.int32)
        at = 0
        for number, piece in enumerate(pieces):
            begin = int(self.cache.starts[piece.document]) + piece.first
            end = min(begin + piece.length + 1, int(self.cache.starts[piece.document + 1]))
            tokens = np.asarray(self.cache.tokens[begin:end], np.int64)
            there = slice(at, at + piece.length)
            ids[there] = tokens[: piece.length]
            labels[at : at + len(tokens) - 1] = self._labels(tokens, begin, end)
            positions[there] = np.arange(piece.length)
            segments[there] = number
            at += piece.length
        if at < length:  # what is left over belongs to nobody
            positions[at:] = np.arange(length - at)
            segments[at:] = len(pieces)
        return ids, labels, positions, segments, len(pieces)

    def _labels(self, tokens: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Return what each token but the last predicts: the one behind it, if that is learned."""
        following = tokens[1:]
        if self.cache.targets is None:
            return following
        return np.where(self.cache.targets[begin + 1 : end], following, IGNORED)


def _lost(cache: TokenCache, seq_tokens: int) -> set[int]:
    """Return the documents that have nothing to learn once they are cut to the length of a row."""
    if cache.targets is None:
        return set()
    long = np.flatnonzero(cache.lengths - 1 > seq_tokens)
    first = cache.starts[long] + 1
    return {
        int(document)
        for document, begin in zip(long, first, strict=True)
        if not cache.targets[begin : begin + seq_tokens].any()
    }
