"""Turns the chunks of a step into the tensors a model reads, with one copy to the device.

Knows positions, slots and page rows; knows no requests and no policy. Start at `pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mxn.kernels.batch import AttentionBatch, StepBatch

if TYPE_CHECKING:
    import torch

# Each part of the shared buffer starts on a multiple of 16 int64 (128 bytes): some kernels read
# whole vectors, and Triton compiles one variant less when pointers are always aligned.
ALIGN = 16


@dataclass(slots=True)
class Chunk:
    """The new tokens of one sequence in one forward pass."""

    table_row: int  # its row in `PageRows.table`
    start: int  # position of the first token
    token_ids: Sequence[int]
    num_logits: int  # how many of its last rows have their logits wanted

    def without_last(self, num_tokens: int) -> Chunk:
        """Return the chunk without its last tokens and their logits."""
        kept = self.token_ids[: len(self.token_ids) - num_tokens]
        return Chunk(self.table_row, self.start, kept, self.num_logits - num_tokens)

    def split(self, at: int) -> tuple[Chunk, Chunk]:
        """Return the first `at` tokens and the rest, which together want the same logits."""
        num_rest = len(self.token_ids) - at
        first = Chunk(
            self.table_row, self.start, self.token_ids[:at], max(0, self.num_logits - num_rest)
        )
        rest = Chunk(
            self.table_row, self.start + at, self.token_ids[at:], min(self.num_logits, num_rest)
        )
        return first, rest


class PageRows:
    """The page ids of every running sequence, kept as rows of one matrix between steps.

    A step then copies rows instead of walking lists: the cost does not grow with the context.
    """

    def __init__(self, num_rows: int, max_pages: int) -> None:
        self.table = np.zeros((num_rows, max_pages), dtype=np.int64)
        self._free = list(range(num_rows - 1, -1, -1))
        self._filled: dict[int, int] = {}
        self._is_run: dict[int, bool] = {}

    @property
    def num_used(self) -> int:
        return len(self._filled)

    def take(self) -> int:
        """Return a free row."""
        row = self._free.pop()
        self._filled[row] = 0
        self._is_run[row] = True
        return row

    def update(self, row: int, page_ids: Sequence[int]) -> None:
        """Append the pages that were added since the last call."""
        filled, num_pages = self._filled[row], len(page_ids)
        if num_pages != filled:
            self.table[row, filled:num_pages] = page_ids[filled:num_pages]
            self._filled[row] = num_pages
            since = self.table[row, max(0, filled - 1) : num_pages]
            self._is_run[row] = self._is_run[row] and bool((np.diff(since) == 1).all())

    def cut(self, row: int, num_pages: int) -> None:
        """Forget the pages behind the first `num_pages`: the sequence may get others there."""
        if self._filled[row] > num_pages:
            self._filled[row] = num_pages
            kept = self.table[row, :num_pages]
            self._is_run[row] = bool((np.diff(kept) == 1).all())

    def run_start(self, row: int) -> int:
        """Return the first page if the row's pages lie one behind the other in memory, else -1."""
        return int(self.table[row, 0]) if self._is_run[row] else -1

    def release(self, row: int) -> None:
        """Give a row back; its pages are not its own any more."""
        self._free.append(row)
        del self._filled[row], self._is_run[row]


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch and the memory behind it."""

    batch: StepBatch
    host: np.ndarray  # int64; all tensors of the batch, one behind the other
    device: torch.Tensor  # the same on the device; the same memory where that is the processor
    offsets: list[int]  # where in `host` each part begins


def pack(
    chunks: Sequence[Chunk], rows: PageRows, page_tokens: int, device: torch.device
) -> StepBatch:
    """Return the batch of `chunks`, in their order, on `device`.

    `logits_rows_R` names the wanted rows chunk by chunk; it is None when all rows are wanted.
    """
    return pack_with_memory(chunks, rows, page_tokens, device).batch


def pack_with_memory(
    chunks: Sequence[Chunk], rows: PageRows, page_tokens: int, device: torch.device
) -> Packed:
    """Return what `pack` does, and where it lies.

    The parts are token ids, positions, slots, context lengths, starts of queries, the page table
    and, where not all rows are wanted, the wanted ones.
    """
    lens_S = np.array([len(chunk.token_ids) for chunk in chunks])
    starts_S = np.array([chunk.start for chunk in chunks])
    rows_S = np.array([chunk.table_row for chunk in chunks])
    query_starts_S1 = np.zeros(len(chunks) + 1, dtype=np.int64)
    np.cumsum(lens_S, out=query_starts_S1[1:])
    num_tokens = int(query_starts_S1[-1])
    is_decode = num_tokens == len(chunks)
    if is_decode:
        tokens_T = [chunk.token_ids[0] for chunk in chunks]
        positions_T, rows_T = starts_S, rows_S
    else:
        tokens_T = [token for chunk in chunks for token in chunk.token_ids]
        positions_T = np.arange(num_tokens) + np.repeat(starts_S - query_starts_S1[:-1], lens_S)
        rows_T = np.repeat(rows_S, lens_S)
    slots_T = rows.table[rows_T, positions_T // page_tokens] * page_tokens
    slots_T += positions_T % page_tokens
    context_lens_S = starts_S + lens_S
    num_pages = -(-int(context_lens_S.max()) // page_tokens)
    wanted = _wanted_rows(chunks, query_starts_S1, num_tokens)
    parts = [
        tokens_T, positions_T, slots_T, context_lens_S, query_starts_S1,
        rows.table[rows_S, :num_pages].reshape(-1), *([] if wanted is None else [wanted]),
    ]  # fmt: skip
    host, on_device, offsets = _to_device(parts, device)
    ends = zip(offsets, parts, strict=True)
    tensors = [on_device[offset : offset + len(part)] for offset, part in ends]
    attention = AttentionBatch(
        query_starts=query_starts_S1.tolist(),
        context_lens=context_lens_S.tolist(),
        page_table_SP=tensors[5].view(len(chunks), num_pages),
        context_lens_S=tensors[3],
        query_starts_S1=tensors[4],
        slots_T=tensors[2],
        page_tokens=page_tokens,
        run_starts=_run_starts(chunks, rows, page_tokens),
    )
    batch = StepBatch(
        token_ids_T=tensors[0],
        positions_T=tensors[1],
        attention=attention,
        logits_rows_R=None if wanted is None else tensors[6],
    )
    return Packed(batch, host, on_device, offsets)


def _run_starts(chunks: Sequence[Chunk], rows: PageRows, page_tokens: int) -> list[int]:
    """Return the first slot of each sequence whose cache can be read in place, -1 for others."""
    first_pages = (rows.run_start(chunk.table_row) for chunk in chunks)
    return [page * page_tokens if page >= 0 else -1 for page in first_pages]


def _wanted_rows(
    chunks: Sequence[Chunk], query_starts_S1: np.ndarray, num_tokens: int
) -> list[int] | None:
    """Return the rows of T whose logits are wanted, or None for all of them."""
    wanted: list[int] = []
    for chunk, end in zip(chunks, query_starts_S1[1:].tolist(), strict=True):
        wanted.extend(range(end - chunk.num_logits, end))
    return None if len(wanted) == num_tokens else wanted


def _to_device(
    parts: Sequence[Sequence[int] | np.ndarray], device: torch.device
) -> tuple[np.ndarray, torch.Tensor, list[int]]:
    """Return one int64 buffer of all parts, its copy on `device`, and where each part begins."""
    import torch

    offsets, total = [], 0
    for part in parts:
        offsets.append(total)
        total += -(-len(part) // ALIGN) * ALIGN
    buffer = np.zeros(total, dtype=np.int64)
    for part, offset in zip(parts, offsets, strict=True):
        buffer[offset : offset + len(part)] = part
    return buffer, torch.from_numpy(buffer).to(device), offsets
