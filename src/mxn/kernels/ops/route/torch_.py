"""`route` in torch, for any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxn.kernels.registry import kernel

if TYPE_CHECKING:
    from mxn.kernels.params import RouterSpec


@kernel("route", name="torch")
def route(logits_TE: Tensor, bias_E: Tensor | None, router: RouterSpec) -> tuple[Tensor, Tensor]:
    wide = logits_TE.float()
    scores_TE = wide.sigmoid() if router.scoring == "sigmoid" else wide.softmax(-1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if router.num_groups > 1:
        choice_TE = _only_best_groups(choice_TE, router)
    ids_Tk = choice_TE.topk(router.top_k, dim=-1).indices
    weights_Tk = scores_TE.gather(1, ids_Tk)
    if router.normalize:
        # transformers adds the constant for sigmoid scores; for softmax it changes no float.
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return weights_Tk * router.scale, ids_Tk


def _only_best_groups(choice_TE: Tensor, router: RouterSpec) -> Tensor:
    grouped = choice_TE.unflatten(1, (router.num_groups, -1))
    if router.group_score == "top2_sum":
        score_TU = grouped.topk(2, dim=-1).values.sum(-1)
    else:
        score_TU = grouped.amax(-1)
    best = score_TU.topk(router.top_groups, dim=-1).indices
    is_in = torch.zeros_like(score_TU, dtype=torch.bool).scatter(1, best, True)
    return torch.where(is_in.unsqueeze(-1), grouped, float("-inf")).flatten(1)
