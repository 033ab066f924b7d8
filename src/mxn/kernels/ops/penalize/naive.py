"""The truth of `penalize`.

Source: repetition, Keskar et al. 2019 (CTRL), section 4.1; subtraction, the OpenAI API reference.
"""

from __future__ import annotations

from torch import Tensor


def penalize(
    logits_RV: Tensor, rows_M: Tensor, ids_M: Tensor, repetition_M: Tensor, subtract_M: Tensor
) -> Tensor:
    for m, (row, token) in enumerate(zip(rows_M.tolist(), ids_M.tolist(), strict=True)):
        logit = logits_RV[row, token]
        logit = logit / repetition_M[m] if logit > 0 else logit * repetition_M[m]
        logits_RV[row, token] = logit - subtract_M[m]
    return logits_RV
