"""`l2_normalize` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("l2_normalize", name="torch")
def l2_normalize(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)
