"""`mla_attention` in torch, for any device.

Shape letters: C latent and rotary dims of a cache row, W the latent ones (values), L context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.paged_attention.gather import decode_rows, rows_of_sequence, visible
from mxn.kernels.registry import kernel

_MAX_SCORES = 1 << 25  # 128 MiB of float32 scores at a time


@kernel("mla_attention", name="torch")
def mla_attention(
    q_TNC: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, v_dim: int
) -> Tensor:
    out_TNW = q_TNC.new_empty(*q_TNC.shape[:2], v_dim)
    group = decode_rows(batch, None)
    if group is not None:
        rows_SLC = group.gather(cache).squeeze(2)
        q_SNC = q_TNC if group.is_all else q_TNC[group.rows_S]
        mask = None if group.mask_S11L is None else group.mask_S11L.squeeze(1)
        mixed = _attend(q_SNC, rows_SLC, mask, scale, v_dim)
        if group.is_all:
            return mixed
        out_TNW[group.rows_S] = mixed
    prefill_chunks(out_TNW, q_TNC, cache, batch, scale)
    return out_TNW


def prefill_chunks(
    out_TNW: Tensor,
    q_TNC: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    least: int = 2,
) -> None:
    """Fill the rows of all sequences that have at least `least` new tokens."""
    starts = batch.query_starts
    for s in range(batch.num_sequences):
        if starts[s + 1] - starts[s] >= least:
            rows_LC = rows_of_sequence(cache, batch, s).squeeze(1)
            _prefill(
                q_TNC[starts[s] : starts[s + 1]], rows_LC, scale, out_TNW[starts[s] : starts[s + 1]]
            )


def _prefill(q_TNC: Tensor, rows_LC: Tensor, scale: float, out_TNW: Tensor) -> None:
    num_new, heads = q_TNC.shape[:2]
    context = len(rows_LC)
    step = max(1, _MAX_SCORES // (heads * context))
    for begin in range(0, num_new, step):
        end = min(num_new, begin + step)
        seen = context - num_new + end  # later keys are invisible to these rows: leave them out
        mask = visible(end - begin, seen, None, q_TNC.device).unsqueeze(1)
        out_TNW[begin:end] = _attend(
            q_TNC[begin:end], rows_LC[:seen], mask, scale, out_TNW.shape[-1]
        )


def _attend(q: Tensor, rows: Tensor, mask: Tensor | None, scale: float, v_dim: int) -> Tensor:
    scores = torch.matmul(q, rows.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1).to(rows.dtype), rows[..., :v_dim])
