"""`argmax` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("argmax", name="torch")
def argmax(logits_RV: Tensor) -> Tensor:
    values_R, ids_R = logits_RV.max(dim=1)  # a NaN counts as the largest
    return torch.where(values_R.isfinite(), ids_R, -1)
