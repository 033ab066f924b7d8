"""`embedding` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("embedding", name="torch")
def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    return torch.nn.functional.embedding(ids_T, table_VD)
