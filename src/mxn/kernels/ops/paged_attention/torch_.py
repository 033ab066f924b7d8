"""`paged_attention` in torch, for any device.

Sequences with one new token run together, padded to the longest; each prefill chunk runs alone, so
that no product is spent on padding. Keys and values are never repeated for grouped queries: the
queries of a group stand where a sequence's positions usually do.

Shape letters: L longest context of the group, U queries that share a key head (N / G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.paged_attention.gather import (
    DecodeRows,
    decode_rows,
    rows_of_sequence,
    visible,
)
from mxn.kernels.registry import kernel

_sdpa = torch.nn.functional.scaled_dot_product_attention


@kernel("paged_attention", name="torch")
def paged_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    out_TNJ = q_TNH.new_empty(*q_TNH.shape[:2], v_cache.shape[-1])
    group = decode_rows(batch, window)
    if group is not None:
        mixed = _decode(q_TNH, k_cache, v_cache, group, scale, softcap)
        if group.is_all:
            return mixed
        out_TNJ[group.rows_S] = mixed
    starts = batch.query_starts
    for s in range(batch.num_sequences):
        if starts[s + 1] - starts[s] > 1:
            q = q_TNH[starts[s] : starts[s + 1]]
            k = rows_of_sequence(k_cache, batch, s)
            v = rows_of_sequence(v_cache, batch, s)
            out_TNJ[starts[s] : starts[s + 1]] = _prefill(q, k, v, scale, window, softcap)
    return out_TNJ


def _decode(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: DecodeRows,
    scale: float,
    softcap: float | None,
) -> Tensor:
    num_groups = k_cache.shape[2]
    q_SNH = q_TNH if group.is_all else q_TNH[group.rows_S]
    q_SGUH = q_SNH.unflatten(1, (num_groups, -1))
    k_SGLH = group.gather(k_cache).transpose(1, 2)
    v_SGLJ = group.gather(v_cache).transpose(1, 2)
    mixed = _attend(q_SGUH, k_SGLH, v_SGLJ, group.mask_S11L, scale, softcap)
    return mixed.flatten(1, 2)


def _prefill(
    q_TNH: Tensor,
    k_LGH: Tensor,
    v_LGJ: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_new, context = len(q_TNH), len(k_LGH)
    if softcap is None:
        is_plain = num_new == context and (window is None or window >= context)
        mask = None if is_plain else visible(num_new, context, window, q_TNH.device)
        mixed = _sdpa(
            q_TNH.transpose(0, 1).unsqueeze(0),
            k_LGH.transpose(0, 1).unsqueeze(0),
            v_LGJ.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=is_plain,
            scale=scale,
            enable_gqa=q_TNH.shape[1] != k_LGH.shape[1],
        )
        return mixed.squeeze(0).transpose(0, 1)
    num_groups = k_LGH.shape[1]
    q_GUTH = q_TNH.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
    mask = visible(num_new, context, window, q_TNH.device)
    mixed = _attend(
        q_GUTH, k_LGH.transpose(0, 1)[:, None], v_LGJ.transpose(0, 1)[:, None], mask, scale, softcap
    )
    return mixed.permute(2, 0, 1, 3).flatten(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of q [..., Q, H] over k [..., L, H]; `mask` is True where a query may look."""
    if softcap is None:
        return _sdpa(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)
