"""The truth of `rms_norm`.

Source: Zhang & Sennrich 2019, eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x.float()
    mean_square = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
    normed = wide / (mean_square + eps).sqrt()
    if weight_D.dtype == torch.float32:
        return (weight_D * normed).to(x.dtype)
    return weight_D * normed.to(x.dtype)
