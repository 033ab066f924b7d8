"""The truth of `argmax`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def argmax(logits_RV: Tensor) -> Tensor:
    ids = []
    for row in logits_RV.float().tolist():
        top = math.nan if any(math.isnan(value) for value in row) else max(row)
        ids.append(row.index(top) if math.isfinite(top) else -1)
    return torch.tensor(ids, dtype=torch.int64, device=logits_RV.device)
