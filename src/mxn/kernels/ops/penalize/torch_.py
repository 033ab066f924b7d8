"""`penalize` in torch, for any device. Costs what the pairs cost, not what the vocabulary costs."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("penalize", name="torch")
def penalize(
    logits_RV: Tensor, rows_M: Tensor, ids_M: Tensor, repetition_M: Tensor, subtract_M: Tensor
) -> Tensor:
    values = logits_RV[rows_M, ids_M]
    values = torch.where(values > 0, values / repetition_M, values * repetition_M) - subtract_M
    return logits_RV.index_put_((rows_M, ids_M), values)
