"""The truth of `mla_attention`: one key head for all queries; values are its first dims."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.paged_attention.naive import paged_attention


def mla_attention(
    q_TNC: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, v_dim: int
) -> Tensor:
    return paged_attention(q_TNC, cache, cache[..., :v_dim], batch, scale)
