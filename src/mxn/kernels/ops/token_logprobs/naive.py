"""The truth of `token_logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits_RV: Tensor, ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits_RV.double()
    logprobs_RV = (wide - wide.logsumexp(-1, keepdim=True)).float()
    chosen_R = logprobs_RV[torch.arange(len(ids_R)), ids_R]
    best = logprobs_RV.sort(dim=1, descending=True)
    return chosen_R, best.values[:, :num_top], best.indices[:, :num_top]
