"""`sample` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("sample", name="torch")
def sample(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    peak_R1, best_R1 = logits_RV.max(dim=1, keepdim=True)
    mass_RV = (logits_RV - peak_R1).exp_()
    reached_RV = mass_RV.cumsum(1)
    total_R1 = reached_RV[:, -1:]
    target_R1 = uniform_R.unsqueeze(1) * total_R1
    ids_R1 = torch.searchsorted(reached_RV, target_R1, right=True)
    ids_R1 = ids_R1.clamp_max(logits_RV.shape[1] - 1)
    # A parallel scan may be off by a rounding error and point at a token without mass.
    ids_R1 = torch.where(mass_RV.gather(1, ids_R1) > 0, ids_R1, best_R1)
    return torch.where(total_R1 > 0, ids_R1, -1).squeeze(1)
