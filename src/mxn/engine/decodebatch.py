"""The tensors of a step in which every sequence computes one token, moved on from step to step.

While the same sequences decode, each step differs from the one before by a token, a position and
a slot for each of them, and by a page now and then. So the memory of the last step is written over,
and whoever knows its addresses may keep them. `DecodeBatch.move_on` alone decides whether a step
goes on where the last one stopped; if not, it is packed anew. Knows no requests and no policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import TYPE_CHECKING

import torch

from mxn.engine.stepbatch import ALIGN, Chunk, PageRows, pack_with_memory

if TYPE_CHECKING:
    from mxn.engine.plan import ScheduledSequence
    from mxn.kernels.batch import StepBatch


class DecodeBatch:
    """The batch of the last step of decodes."""

    def __init__(
        self,
        items: Sequence[ScheduledSequence],
        table_rows: Sequence[int],
        rows: PageRows,
        page_tokens: int,
        device: torch.device,
    ) -> None:
        """`items` compute one token each (`StepPlan.is_decode`); `rows` knows all their pages."""
        chunks = [
            Chunk(row, item.start, (item.sequence.token_ids[item.start],), 1)
            for row, item in zip(table_rows, items, strict=True)
        ]
        packed = pack_with_memory(chunks, rows, page_tokens, device)
        self.batch: StepBatch = packed.batch
        self.table_rows = table_rows
        self._rows, self._page_tokens = rows, page_tokens
        self._sequences = [item.sequence for item in items]
        self._pages = [item.pages for item in items]  # live lists, which only grow while they last
        self._num_pages = [len(item.pages) for item in items]
        self._memory = packed.host.data.cast("B")
        num, width = packed.batch.attention.page_table_SP.shape
        self._table = packed.host[packed.offsets[5] :][: num * width].reshape(num, width)
        self._fields = _fields(num)
        is_shared = packed.device.device.type == "cpu"
        self._upload = None if is_shared else (packed.device, torch.from_numpy(packed.host))

    def move_on(self, items: Sequence[ScheduledSequence]) -> bool:
        """Make this the batch of `items`, one token each. False: they do not go on; pack anew.

        They do when the same sequences, in the same order and still on their pages, each compute
        the token behind the last one.
        """
        sequences, pages_of, num_pages = self._sequences, self._pages, self._num_pages
        if len(items) != len(sequences):
            return False
        contexts = self.batch.attention.context_lens
        size = self._page_tokens
        tokens: list[int] = []
        slots: list[int] = []
        for i, (sequence, start, _, pages, _, _, _) in enumerate(items):
            if sequence is not sequences[i] or start != contexts[i] or pages is not pages_of[i]:
                return False
            if len(pages) != num_pages[i] and not self._add_pages(i, pages):
                return False
            tokens.append(sequence.token_ids[start])
            slots.append(pages[start // size] * size + start % size)
        self._write(tokens, contexts[:], slots)
        return True

    def _add_pages(self, i: int, pages: list[int]) -> bool:
        """Enter the pages that a sequence got; False when the table has no column for them."""
        first, last = self._num_pages[i], len(pages)
        if last < first or last > self._table.shape[1]:
            return False
        self._rows.update(self.table_rows[i], pages)
        self._table[i, first:last] = pages[first:last]
        self._num_pages[i] = last
        run_starts = self.batch.attention.run_starts
        assert run_starts is not None, "pack fills them in"
        first_page = self._rows.run_start(self.table_rows[i])
        run_starts[i] = first_page * self._page_tokens if first_page >= 0 else -1
        return True

    def _write(self, tokens: Iterable[int], positions: list[int], slots: Iterable[int]) -> None:
        attention = self.batch.attention
        contexts = [position + 1 for position in positions]
        attention.context_lens[:] = contexts
        attention.derived.clear()
        self._fields.pack_into(self._memory, 0, *tokens, *positions, *slots, *contexts)
        if self._upload is not None:
            on_device, host = self._upload
            on_device.copy_(host)


def _fields(num: int) -> Struct:
    """Return the first four parts of a buffer of `pack_with_memory`, each with its padding."""
    padding = -num % ALIGN * 8
    return Struct("=" + f"{num}q{padding}x" * 4)
