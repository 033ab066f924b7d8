"""The truth of `route`, token by token.

Source: DeepSeek-V3 (arXiv 2412.19437) eq. 13-16, DeepSeek-V2 (arXiv 2405.04434) section 2.2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mxn.kernels.params import RouterSpec


def route(logits_TE: Tensor, bias_E: Tensor | None, router: RouterSpec) -> tuple[Tensor, Tensor]:
    weights = torch.zeros(len(logits_TE), router.top_k, device=logits_TE.device)
    ids = torch.zeros_like(weights, dtype=torch.int64)
    for t, logits in enumerate(logits_TE.float()):
        scores = torch.sigmoid(logits) if router.scoring == "sigmoid" else logits.softmax(0)
        choice = scores if bias_E is None else scores + bias_E
        allowed = _allowed_experts(choice.tolist(), router)
        best = sorted(allowed, key=lambda e: -float(choice[e]))[: router.top_k]
        ids[t] = torch.tensor(best)
        weights[t] = scores[best]
        if router.normalize:
            weights[t] /= weights[t].sum() + 1e-20
    return weights * router.scale, ids


def _allowed_experts(choice: list[float], router: RouterSpec) -> list[int]:
    size = len(choice) // router.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.num_groups)]

    def group_score(experts: list[int]) -> float:
        values = sorted((choice[e] for e in experts), reverse=True)
        return sum(values[:2]) if router.group_score == "top2_sum" else values[0]

    if router.num_groups > 1:
        groups = sorted(groups, key=group_score, reverse=True)[: router.top_groups]
    return sorted(e for group in groups for e in group)
