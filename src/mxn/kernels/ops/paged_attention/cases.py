"""Parity cases of `paged_attention`: whatever lies outside a context is NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxn.kernels.batch import AttentionBatch
from mxn.kernels.parity import Case, Maker

# (new tokens, context) of each sequence
STEPS: dict[str, tuple[tuple[int, int], ...]] = {
    "empty": (),
    "first token": ((1, 1),),
    "decode 1": ((1, 37),),
    "decode equal": ((1, 16), (1, 16), (1, 16)),
    "decode ragged": ((1, 1), (1, 17), (1, 64), (1, 5)),
    "prefill 1": ((19, 19),),
    "prefill exact page": ((16, 16),),
    "chunk": ((7, 30),),
    "mixed": ((1, 9), (11, 11), (1, 33), (5, 22), (2, 2)),
}


def paged_batch(
    make: Maker, step: tuple[tuple[int, int], ...], page_tokens: int, is_in_order: bool
) -> tuple[AttentionBatch, int]:
    """Return the batch of a step and the number of pages of the cache it needs.

    `is_in_order`: the pages of a sequence lie one behind the other, and the host knows it.
    """
    num_pages = [-(-context // page_tokens) for _, context in step]
    total = sum(num_pages) + 3
    order = torch.arange(total) if is_in_order else make.permutation(total)
    page_ids = [list(map(int, part)) for part in order[1:-2].split(num_pages)] if step else []
    table = torch.zeros(len(step), max(num_pages, default=0), dtype=torch.int64)
    starts, slots = [0], []
    for s, (new, context) in enumerate(step):
        table[s, : num_pages[s]] = torch.tensor(page_ids[s])
        starts.append(starts[-1] + new)
        slots += [
            page_ids[s][p // page_tokens] * page_tokens + p % page_tokens
            for p in range(context - new, context)
        ]
    contexts = [context for _, context in step]
    batch = AttentionBatch(
        query_starts=starts,
        context_lens=contexts,
        page_table_SP=table,
        context_lens_S=torch.tensor(contexts, dtype=torch.int64),
        query_starts_S1=torch.tensor(starts),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        page_tokens=page_tokens,
        run_starts=[ids[0] * page_tokens for ids in page_ids] if is_in_order else None,
    )
    return batch, total


def poisoned_cache(
    make: Maker, batch: AttentionBatch, num_pages: int, groups: int, dim: int
) -> Tensor:
    """Return a cache [num_pages, K, G, dim] that is NaN but for the contexts of the batch."""
    size = batch.page_tokens
    cache = make.normal(num_pages, size, groups, dim)
    is_used = torch.zeros(num_pages * size, dtype=torch.bool)
    for s, context in enumerate(batch.context_lens):
        positions = torch.arange(context)
        is_used[batch.page_table_SP[s, positions // size] * size + positions % size] = True
    cache.view(num_pages * size, -1)[~is_used] = float("nan")
    return cache


def _build(
    make: Maker,
    step: tuple[tuple[int, int], ...],
    heads: int,
    groups: int,
    dims: tuple[int, int],
    page_tokens: int,
    is_in_order: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Any, ...]:
    batch, num_pages = paged_batch(make, step, page_tokens, is_in_order)
    q = make.normal(batch.query_starts[-1], heads * dims[0] + 5)[:, : heads * dims[0]]
    k = poisoned_cache(make, batch, num_pages, groups, dims[0])
    v = poisoned_cache(make, batch, num_pages, groups, dims[1])
    q_TNH = q.unflatten(1, (heads, dims[0]))
    return q_TNH, k, v, batch, dims[0] ** -0.5, window, softcap


_VARIANTS = (
    # heads, groups, (H, J), page tokens, pages in order, window, softcap
    (4, 2, (16, 16), 16, False, None, None),
    (4, 2, (16, 16), 16, True, None, None),
    (6, 1, (24, 24), 7, False, None, None),
    (3, 3, (13, 13), 4, True, None, None),
    (4, 2, (16, 16), 16, False, 6, None),
    (4, 2, (16, 16), 8, True, 6, None),
    (4, 2, (16, 16), 16, False, None, 5.0),
    (4, 1, (16, 16), 16, True, 9, 5.0),
    (4, 2, (24, 16), 16, False, None, None),
)

_TYPICAL = (
    ("decode 1", ((1, 500),)),
    ("decode 16", tuple((1, 200 + 20 * i) for i in range(16))),
    ("prefill 256", ((256, 256),)),
)

# Long enough that a kernel cuts contexts into parts; few, because the truth loops.
LONG = ((1, 520), (1, 3), (1, 257))

CASES = (
    *(
        Case(
            name=f"paged_attention {name} N{v[0]} G{v[1]} H{v[2][0]} J{v[2][1]} K{v[3]}"
            f"{' in order' if v[4] else ''}{f' window {v[5]}' if v[5] else ''}"
            f"{f' softcap {v[6]}' if v[6] else ''}",
            build=lambda make, a=(step, *v): _build(make, *a),
            slack=2.0,  # probabilities may be rounded before they weigh the values
        )
        for name, step in STEPS.items()
        for v in _VARIANTS
    ),
    *(
        Case(
            name=f"paged_attention decode long window {window} softcap {softcap}",
            build=lambda make, a=(window, softcap): _build(
                make, LONG, 4, 2, (16, 16), 16, False, *a
            ),
            slack=2.0,  # as above
        )
        for window, softcap in ((None, None), (300, 5.0))
    ),
    *(
        Case(
            name=f"paged_attention {name} typical",
            build=lambda make, step=step: _build(
                make, step, 16, 8, (128, 128), 16, True, None, None
            ),
            dtypes=(),  # too large for the loops of the truth
            is_typical=True,
        )
        for name, step in _TYPICAL
    ),
)
