"""`add_rms_norm` in torch, for any device."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.ops.rms_norm.torch_ import rms_norm
from mxn.kernels.registry import kernel


@kernel("add_rms_norm", name="torch")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight_D, eps), total
