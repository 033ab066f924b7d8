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
    group = decode_rows(batch, window)
    if group is not None and group.is_all:
        return _decode(q_TNH, k_cache, v_cache, group, scale, softcap)
    out_TNJ = q_TNH.new_empty(*q_TNH.shape[:2], v_cache.shape[-1])
    if group is not None:
        rows = group.rows_S
        out_TNJ[rows] = _decode(q_TNH[rows], k_cache, v_cache, group, scale, softcap)
    prefill_chunks(out_TNJ, q_TNH, k_cache, v_cache, batch, scale, window, softcap)
    return out_TNJ


@kernel("paged_attention", name="torch_runs", chips="x86*", priority=5)
def paged_attention_runs(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `torch`, but sequences whose pages lie in a row are read where they lie, one by one.

    Saves copying the cache, costs a call for each sequence: pays where calls are cheap.
    """
    group = decode_rows(batch, window)
    if group is None or group.runs is None:
        return paged_attention(q_TNH, k_cache, v_cache, batch, scale, window, softcap)
    q_SNH = q_TNH if group.is_all else q_TNH[group.rows_S]
    mixed = _decode_runs(q_SNH, k_cache, v_cache, group.runs, scale, softcap)
    if group.is_all:
        return mixed
    out_TNJ = q_TNH.new_empty(*q_TNH.shape[:2], v_cache.shape[-1])
    out_TNJ[group.rows_S] = mixed
    prefill_chunks(out_TNJ, q_TNH, k_cache, v_cache, batch, scale, window, softcap)
    return out_TNJ


def _decode(
    q_SNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: DecodeRows,
    scale: float,
    softcap: float | None,
) -> Tensor:
    q_SGUH = q_SNH.unflatten(1, (k_cache.shape[2], -1))
    k_SGLH = group.gather(k_cache).transpose(1, 2)
    v_SGLJ = group.gather(v_cache).transpose(1, 2)
    return _attend(q_SGUH, k_SGLH, v_SGLJ, group.mask_S11L, scale, softcap).flatten(1, 2)


def _decode_runs(
    q_SNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    runs: list[tuple[int, int]],
    scale: float,
    softcap: float | None,
) -> Tensor:
    q_SGUH = q_SNH.unflatten(1, (k_cache.shape[2], -1))
    k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    parts = []
    for s, (first, count) in enumerate(runs):
        k_1GLH = k_flat.narrow(0, first, count).transpose(0, 1).unsqueeze(0)
        v_1GLJ = v_flat.narrow(0, first, count).transpose(0, 1).unsqueeze(0)
        parts.append(_attend(q_SGUH[s : s + 1], k_1GLH, v_1GLJ, None, scale, softcap))
    return torch.cat(parts).flatten(1, 2)


def prefill_chunks(
    out_TNJ: Tensor,
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    least: int = 2,
) -> None:
    """Fill the rows of all sequences that have at least `least` new tokens."""
    starts = batch.query_starts
    for s in range(batch.num_sequences):
        if starts[s + 1] - starts[s] >= least:
            rows = slice(starts[s], starts[s + 1])
            k, v = (rows_of_sequence(cache, batch, s) for cache in (k_cache, v_cache))
            out_TNJ[rows] = _prefill(q_TNH[rows], k, v, scale, window, softcap)


def _prefill(
    q_TNH: Tensor,
    k_LGH: Tensor,
    v_LGJ: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_new = len(q_TNH)
    if window is not None:  # older keys no query of the chunk sees
        first = max(0, len(k_LGH) - num_new - window + 1)
        k_LGH, v_LGJ = k_LGH[first:], v_LGJ[first:]
    context = len(k_LGH)
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
