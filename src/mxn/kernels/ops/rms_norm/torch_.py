"""`rms_norm` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("rms_norm", name="torch")
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_D.dtype == torch.float32:
        return (normed * weight_D).to(x.dtype)
    return normed.to(x.dtype) * weight_D


# float32 only: in other dtypes torch rounds once, after the weight; the contract rounds before it.
@kernel("rms_norm", name="torch_fused", dtypes=("float32",), priority=1)
def rms_norm_fused(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, x.shape[-1:], weight_D, eps)
