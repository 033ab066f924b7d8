"""`dense_attention` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("dense_attention", name="torch")
def dense_attention(
    q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    positions = torch.arange(k_BNLH.shape[2], device=k_BNLH.device)
    inside_B11L = (positions < lengths_B.unsqueeze(1))[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(
        q_BNLH, k_BNLH, v_BNLH, attn_mask=inside_B11L, scale=scale
    )
