"""`softcap` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("softcap", name="torch")
def softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap
