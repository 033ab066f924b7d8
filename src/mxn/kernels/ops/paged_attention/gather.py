"""Where the cached rows of a step lie, as device tensors computed once for all layers.

Padding always points at a row of the sequence itself. So no result can depend on what stale pages
hold, not even on NaN, and nothing has to be cleared.

Shape letters: L longest context of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.kernels.batch import AttentionBatch


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The sequences with one new token, and where their cached rows lie."""

    rows_S: Tensor  # rows of T
    is_all: bool  # every sequence of the step is in this group
    runs: list[tuple[int, int]] | None  # (first slot, slots) of each; None: some lie in pieces
    slots_SL: Tensor | None = None  # None: there is one sequence, and it has a run
    mask_S11L: Tensor | None = None  # True inside the context; None: no padding

    def gather(self, cache: Tensor) -> Tensor:
        """Return the rows [S, L, G, H] of a cache [num_pages, K, G, H]."""
        flat = cache.flatten(0, 1)
        if self.slots_SL is None:
            assert self.runs is not None
            first, count = self.runs[0]
            return flat[first : first + count].unsqueeze(0)
        return flat.index_select(0, self.slots_SL.flatten()).unflatten(0, self.slots_SL.shape)


def decode_rows(batch: AttentionBatch, window: int | None) -> DecodeRows | None:
    """Return the decode sequences of the step, or None if there are none. Kept for later layers."""
    key = f"decode_rows window={window}"
    if key not in batch.derived:
        batch.derived[key] = _decode_rows(batch, window)
    return batch.derived[key]


def _decode_rows(batch: AttentionBatch, window: int | None) -> DecodeRows | None:
    starts, lens = batch.query_starts, batch.context_lens
    members = [s for s in range(len(lens)) if starts[s + 1] - starts[s] == 1]
    if not members:
        return None
    device = batch.page_table_SP.device
    first = [max(0, lens[s] - window) if window else 0 for s in members]
    sizes = [lens[s] - f for s, f in zip(members, first, strict=True)]
    rows_S = torch.tensor([starts[s] for s in members], device=device)
    is_all = len(members) == len(lens)
    runs = [_run(batch, *part) for part in zip(members, first, sizes, strict=True)]
    known_runs = None if None in runs else runs
    if known_runs and len(members) == 1:
        return DecodeRows(rows_S, is_all, known_runs)
    longest = max(sizes)
    offsets_L = torch.arange(longest, device=device)
    sizes_S1 = torch.tensor(sizes, device=device).unsqueeze(1)
    inside_SL = offsets_L < sizes_S1
    first_S1 = torch.tensor(first, device=device).unsqueeze(1)
    positions_SL = first_S1 + torch.where(inside_SL, offsets_L, 0)
    table_SP = batch.page_table_SP
    if not is_all:
        table_SP = table_SP[torch.tensor(members, device=device)]
    slots_SL = _slots(table_SP, positions_SL, batch.page_tokens)
    mask = None if min(sizes) == longest else inside_SL[:, None, None, :]
    return DecodeRows(rows_S, is_all, known_runs, slots_SL, mask)


def rows_of_sequence(cache: Tensor, batch: AttentionBatch, s: int) -> Tensor:
    """Return all cached rows [context, G, H] of sequence `s`: a view if its pages lie in a row."""
    context = batch.context_lens[s]
    flat = cache.flatten(0, 1)
    run = _run(batch, s, 0, context)
    if run is not None:
        return flat[run[0] : run[0] + run[1]]
    key = f"slots_of_sequence {s}"
    if key not in batch.derived:
        positions = torch.arange(context, device=cache.device).unsqueeze(0)
        table = batch.page_table_SP[s : s + 1]
        batch.derived[key] = _slots(table, positions, batch.page_tokens).squeeze(0)
    return flat.index_select(0, batch.derived[key])


def visible(num_new: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """Return [num_new, context]: may the i-th new token, at the end of the context, see j?"""
    at = torch.arange(context - num_new, context, device=device).unsqueeze(1)
    seen = torch.arange(context, device=device)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def _run(batch: AttentionBatch, s: int, first: int, count: int) -> tuple[int, int] | None:
    """Return (first slot, count) if the pages of these positions lie one behind the other."""
    if batch.run_starts is None or batch.run_starts[s] < 0:
        return None
    return batch.run_starts[s] + first, count


def _slots(table_SP: Tensor, positions_SL: Tensor, page_tokens: int) -> Tensor:
    pages = table_SP.gather(1, positions_SL // page_tokens)
    return pages * page_tokens + positions_SL % page_tokens
