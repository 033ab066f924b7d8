"""The truth of `dequant_fp8`, block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def dequant_fp8(
    weight_FD: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    out_FD = torch.empty(weight_FD.shape, dtype=dtype, device=weight_FD.device)
    for i in range(scale_inv.shape[0]):
        rows = slice(i * block[0], (i + 1) * block[0])
        for j in range(scale_inv.shape[1]):
            cols = slice(j * block[1], (j + 1) * block[1])
            out_FD[rows, cols] = (weight_FD[rows, cols].float() * scale_inv[i, j]).to(dtype)
    return out_FD
