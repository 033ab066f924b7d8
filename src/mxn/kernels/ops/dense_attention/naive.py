"""The truth of `dense_attention`. Rows behind a sequence's length are zero here."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    out_BNLH = torch.zeros_like(q_BNLH)
    for b, length in enumerate(lengths_B.tolist()):
        q, k, v = (x[b, :, :length].float() for x in (q_BNLH, k_BNLH, v_BNLH))
        weights = (q @ k.transpose(1, 2) * scale).softmax(-1)
        out_BNLH[b, :, :length] = (weights @ v).to(q_BNLH.dtype)
    return out_BNLH
