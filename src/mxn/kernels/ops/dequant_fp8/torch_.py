"""`dequant_fp8` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("dequant_fp8", name="torch")
def dequant_fp8(
    weight_FD: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    rows, cols = weight_FD.shape
    scale_FB = scale_inv.float().repeat_interleave(block[0], dim=0)[:rows]
    scale_FD = scale_FB.repeat_interleave(block[1], dim=1)[:, :cols]
    return (weight_FD.float() * scale_FD).to(dtype)
