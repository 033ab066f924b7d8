"""`filter_logits` in torch, for any device.

Each rule becomes a floor under the logits, found among the best `num_candidates` of a row, because
sorting a whole vocabulary costs more than the rest of the step. Shape letter: C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("filter_logits", name="torch")
def filter_logits(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor | None,
    top_p_R: Tensor | None,
    min_p_R: Tensor | None,
    num_candidates: int | None = None,
) -> tuple[Tensor, Tensor]:
    vocab = logits_RV.shape[1]
    num_best = min(vocab, num_candidates or vocab)
    scaled_RV = logits_RV.float() / temperature_R.unsqueeze(1)
    best_RC = scaled_RV.topk(num_best, dim=1).values
    floor_R1 = torch.full_like(best_RC[:, :1], float("-inf"))
    is_exact_R = torch.ones_like(temperature_R, dtype=torch.bool)
    if top_k_R is not None:
        floor_R1, is_exact_R = _top_k_floor(best_RC, top_k_R, vocab)
    if top_p_R is not None:
        floor_R1, is_reached_R = _top_p_floor(scaled_RV, best_RC, floor_R1, top_p_R)
        is_exact_R = is_exact_R & is_reached_R
    if min_p_R is not None:
        floor_R1 = torch.maximum(floor_R1, best_RC[:, :1] + min_p_R.log().unsqueeze(1))
    return torch.where(scaled_RV >= floor_R1, scaled_RV, float("-inf")), is_exact_R


def _top_k_floor(best_RC: Tensor, top_k_R: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    num_best = best_RC.shape[1]
    is_on_R = (top_k_R > 0) & (top_k_R < vocab)
    kth_R1 = best_RC.gather(1, (top_k_R - 1).clamp(0, num_best - 1).unsqueeze(1))
    floor_R1 = torch.where(is_on_R.unsqueeze(1), kth_R1, float("-inf"))
    return floor_R1, ~is_on_R | (top_k_R <= num_best)


def _top_p_floor(
    scaled_RV: Tensor, best_RC: Tensor, floor_R1: Tensor, top_p_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise the floor so that what stands over it holds top_p of the mass over `floor_R1`.

    Also returns which rows could be decided with the candidates given.
    """
    peak_R1 = best_RC[:, :1]
    mass_RV = torch.where(scaled_RV >= floor_R1, (scaled_RV - peak_R1).exp(), 0.0)
    wanted_R1 = top_p_R.unsqueeze(1) * mass_RV.sum(1, keepdim=True)
    mass_RC = torch.where(best_RC >= floor_R1, (best_RC - peak_R1).exp(), 0.0)
    reached_RC = mass_RC.cumsum(1)
    num_kept_R1 = ((reached_RC - mass_RC) < wanted_R1).sum(1, keepdim=True)
    last_R1 = best_RC.gather(1, num_kept_R1.clamp(1, best_RC.shape[1]) - 1)
    is_on_R1 = (top_p_R < 1).unsqueeze(1)
    raised_R1 = torch.where(is_on_R1, torch.maximum(floor_R1, last_R1), floor_R1)
    if best_RC.shape[1] == scaled_RV.shape[1]:
        return raised_R1, torch.ones_like(top_p_R, dtype=torch.bool)
    is_reached_R1 = ~is_on_R1 | (reached_RC[:, -1:] >= wanted_R1)
    return raised_R1, is_reached_R1.squeeze(1)
