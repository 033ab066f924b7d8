"""`filter_logits` in torch, for any device.

Each rule becomes a threshold on the logit, found among the best `num_candidates` of a row, because
sorting a whole vocabulary costs more than the rest of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("filter_logits", name="torch")
def filter_logits(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    num_candidates: int | None = None,
) -> tuple[Tensor, Tensor]:
    vocab = logits_RV.shape[1]
    num_best = min(vocab, num_candidates or vocab)
    scaled_RV = logits_RV.float() / temperature_R.unsqueeze(1)
    best_RC = scaled_RV.topk(num_best, dim=1).values
    peak_R1 = best_RC[:, :1]

    wants_k_R = (top_k_R > 0) & (top_k_R < vocab)
    kth_R1 = best_RC.gather(1, (top_k_R - 1).clamp(0, num_best - 1).unsqueeze(1))
    floor_R1 = torch.where(wants_k_R.unsqueeze(1), kth_R1, float("-inf"))
    is_exact_R = ~wants_k_R | (top_k_R <= num_best)

    # The mass that top-p divides by: what top-k left, ties included.
    mass_RV = torch.where(scaled_RV >= floor_R1, (scaled_RV - peak_R1).exp(), 0.0)
    wanted_R1 = top_p_R.unsqueeze(1) * mass_RV.sum(1, keepdim=True)
    mass_RC = torch.where(best_RC >= floor_R1, (best_RC - peak_R1).exp(), 0.0)
    reached_RC = mass_RC.cumsum(1)
    num_kept_R1 = ((reached_RC - mass_RC) < wanted_R1).sum(1, keepdim=True).clamp(1, num_best)
    wants_p_R = top_p_R < 1
    last_R1 = best_RC.gather(1, num_kept_R1 - 1)
    floor_R1 = torch.maximum(floor_R1, torch.where(wants_p_R.unsqueeze(1), last_R1, float("-inf")))
    if num_best < vocab:
        is_exact_R = is_exact_R & (~wants_p_R | (reached_RC[:, -1:] >= wanted_R1).squeeze(1))

    floor_R1 = torch.maximum(floor_R1, peak_R1 + min_p_R.log().unsqueeze(1))
    return torch.where(scaled_RV >= floor_R1, scaled_RV, float("-inf")), is_exact_R
