"""The truth of `paged_attention`: one query head at a time, scores and sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.batch import AttentionBatch


def paged_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    num_tokens, heads = q_TNH.shape[:2]
    queries_per_group = heads // k_cache.shape[2]
    out_TNJ = q_TNH.new_empty(num_tokens, heads, v_cache.shape[-1])
    for s, context in enumerate(batch.context_lens):
        begin, end = batch.query_starts[s], batch.query_starts[s + 1]
        slots = [_slot(batch, s, position) for position in range(context)]
        keys = torch.stack([k_cache[page, offset] for page, offset in slots]).float()
        values = torch.stack([v_cache[page, offset] for page, offset in slots]).float()
        for t in range(begin, end):
            position = context - (end - t)
            first = 0 if window is None else max(0, position - window + 1)
            for n in range(heads):
                g = n // queries_per_group
                scores = keys[first : position + 1, g] @ q_TNH[t, n].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out_TNJ[t, n] = scores.softmax(0) @ values[first : position + 1, g]
    return out_TNJ


def _slot(batch: AttentionBatch, s: int, position: int) -> tuple[int, int]:
    page = int(batch.page_table_SP[s, position // batch.page_tokens])
    return page, position % batch.page_tokens
