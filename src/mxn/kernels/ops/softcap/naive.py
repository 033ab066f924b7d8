"""The truth of `softcap`."""

from __future__ import annotations

import torch
from torch import Tensor


def softcap(x: Tensor, cap: float) -> Tensor:
    return (cap * torch.tanh(x.float() / cap)).to(x.dtype)
