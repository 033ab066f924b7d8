"""`add_rms_norm` in torch, for any device."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.ops.rms_norm import torch_ as norms
from mxn.kernels.registry import kernel


@kernel("add_rms_norm", name="torch")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norms.rms_norm(total, weight_D, eps), total


@kernel("add_rms_norm", name="torch_fused", dtypes=("float32",), priority=1)
def add_rms_norm_fused(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norms.rms_norm_fused(total, weight_D, eps), total
