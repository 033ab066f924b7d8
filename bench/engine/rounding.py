"""Plain rounding of weights, to know how much a format of so many bits must cost in a model.

The yardstick of `accuracy.py`: symmetric round-to-nearest, eight bits with one scale a row, four
bits with one scale for 128 weights. Knows tensors; knows no engine. Start at `round_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128  # weights that share a scale in four bits
_KEPT = ("embed_tokens", "lm_head")  # formats of four bits leave these in eight


def round_model(model: Any, bits: int) -> None:
    """Replace each matrix of a float32 model by what `bits` bits leave of it, in place.

    Matrices of experts may be stacked: the last dimension is the one that is summed over.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if bits == 8 or any(part in name for part in _KEPT):
            round_rows(weight.data, 8, weight.shape[-1])
        else:
            round_rows(weight.data, bits, GROUP if weight.shape[-1] % GROUP == 0 else 32)


def round_rows(weight: Tensor, bits: int, group: int) -> None:
    """Round [..., in] in place, one scale for `group` neighbours of a row."""
    highest = 2 ** (bits - 1) - 1
    for matrix in weight.reshape(-1, weight.shape[-2], weight.shape[-1]):  # little memory at a time
        grouped = matrix.view(matrix.shape[0], -1, group)
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min_(1e-12) / highest
        grouped.div_(scale).round_().mul_(scale)
