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
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = logits_RV.shape[1]
    num_best = min(vocab, num_candidates or vocab)
    scaled_RV = logits_RV.float() / temperature_R.unsqueeze(1)
    best_RC, ids_RC = scaled_RV.topk(num_best, dim=1)
    worst_R1 = best_RC[:, -1:]
    floor_R1 = torch.full_like(worst_R1, float("-inf"))
    is_known_R1 = torch.ones_like(worst_R1, dtype=torch.bool)
    if top_k_R is not None:
        floor_R1 = _top_k_floor(best_RC, top_k_R, vocab)
        # Ties with the k-th may go on behind the candidates: then their mass is not known.
        is_known_R1 = floor_R1.isinf() | (worst_R1 < floor_R1)
    if top_p_R is not None:
        floor_R1 = _top_p_floor(scaled_RV, best_RC, floor_R1, top_p_R)
    if min_p_R is not None:
        floor_R1 = torch.maximum(floor_R1, best_RC[:, :1] + min_p_R.log().unsqueeze(1))
    if num_best == vocab:
        kept_RV = scaled_RV.masked_fill_(scaled_RV < floor_R1, float("-inf"))
        ids_RV = torch.arange(vocab, device=kept_RV.device).expand_as(kept_RV)
        return kept_RV, ids_RV, torch.ones_like(temperature_R, dtype=torch.bool)
    ids_RC, order_RC = ids_RC.sort(dim=1)
    kept_RC = best_RC.masked_fill(best_RC < floor_R1, float("-inf")).gather(1, order_RC)
    # The worst candidate is refused: then nobody outside is kept, ties included.
    return kept_RC, ids_RC, (is_known_R1 & (worst_R1 < floor_R1)).squeeze(1)


def _top_k_floor(best_RC: Tensor, top_k_R: Tensor, vocab: int) -> Tensor:
    is_on_R1 = ((top_k_R > 0) & (top_k_R < vocab)).unsqueeze(1)
    place_R1 = (top_k_R - 1).clamp(0, best_RC.shape[1] - 1).unsqueeze(1)
    return torch.where(is_on_R1, best_RC.gather(1, place_R1), float("-inf"))


def _top_p_floor(scaled_RV: Tensor, best_RC: Tensor, floor_R1: Tensor, top_p_R: Tensor) -> Tensor:
    """Raise the floor so that what stands over it holds top_p of the mass over `floor_R1`."""
    peak_R1 = best_RC[:, :1]
    mass_RC = (best_RC - peak_R1).exp().masked_fill(best_RC < floor_R1, 0.0)
    reached_RC = mass_RC.cumsum(1)
    all_mass_R1 = (scaled_RV - peak_R1).exp_().sum(1, keepdim=True)
    # Under a floor the candidates hold all the mass, or the row is not exact anyway.
    total_R1 = torch.where(floor_R1.isinf(), all_mass_R1, reached_RC[:, -1:])
    is_needed_RC = (reached_RC - mass_RC) < top_p_R.unsqueeze(1) * total_R1
    num_kept_R1 = is_needed_RC.sum(1, keepdim=True).clamp(1, best_RC.shape[1])
    last_R1 = best_RC.gather(1, num_kept_R1 - 1)
    is_on_R1 = (top_p_R < 1).unsqueeze(1)
    return torch.where(is_on_R1, torch.maximum(floor_R1, last_R1), floor_R1)
