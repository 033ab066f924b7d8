"""The truth of `filter_logits`: each row sorted, rule by rule.

Source: top-p, Holtzman et al. 2019, eq. 2; min-p, Nguyen et al. 2024, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor | None,
    top_p_R: Tensor | None,
    min_p_R: Tensor | None,
    num_candidates: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out_RV = logits_RV.float() / temperature_R.unsqueeze(1)
    for r, row_V in enumerate(out_RV):
        top_k = 0 if top_k_R is None else int(top_k_R[r])
        top_p = 1.0 if top_p_R is None else float(top_p_R[r])
        min_p = 0.0 if min_p_R is None else float(min_p_R[r])
        if 0 < top_k < len(row_V):
            row_V[row_V < row_V.sort(descending=True).values[top_k - 1]] = float("-inf")
        if top_p < 1:
            best_V = row_V.sort(descending=True).values
            before_V = torch.cat((best_V.new_zeros(1), best_V.softmax(0).cumsum(0)[:-1]))
            num_kept = max(1, int((before_V < top_p).sum()))
            row_V[row_V < best_V[num_kept - 1]] = float("-inf")
        probability_V = row_V.softmax(0)
        row_V[probability_V < min_p * probability_V.max()] = float("-inf")
    ids_RV = torch.arange(out_RV.shape[1], device=out_RV.device).expand_as(out_RV)
    return out_RV, ids_RV, torch.ones(len(out_RV), dtype=torch.bool, device=out_RV.device)
