"""The truth of `sample`: walk along the probabilities until their sum passes the random number."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    ids = []
    for row, uniform in zip(logits_RV.double().tolist(), uniform_R.tolist(), strict=True):
        peak = max(row)
        if any(math.isnan(x) for x in row) or math.isinf(peak):
            ids.append(-1)
            continue
        mass = [math.exp(x - peak) for x in row]
        target, reached = uniform * sum(mass), 0.0
        chosen = row.index(peak)
        for token, part in enumerate(mass):
            reached += part
            if reached > target:
                chosen = token
                break
        ids.append(chosen)
    return torch.tensor(ids, dtype=torch.int64, device=logits_RV.device)
