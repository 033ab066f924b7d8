"""`token_logprobs` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("token_logprobs", name="torch")
def token_logprobs(logits_RV: Tensor, ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    chosen_R = logprobs_RV.gather(1, ids_R.unsqueeze(1)).squeeze(1)
    top_Rn, top_ids_Rn = logprobs_RV.topk(num_top, dim=1)
    return chosen_R, top_Rn, top_ids_Rn
