"""Packs small integers as the quantized formats store them: written from their descriptions, the
other way round from `mxn.models.quantized`. Each returns the tensors of one module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # the row that nibble i of a word holds


@dataclass(frozen=True)
class Rounded:
    """A weight rounded to integers: ``scale * (value - zero)``, zeros from 1 on."""

    values: Tensor  # int64 [out, in]
    scales: Tensor  # [out, groups], exact in float16
    zeros: Tensor  # int64 [out, groups]
    index: Tensor  # int64 [in], the group of each column

    @property
    def weight(self) -> Tensor:
        return self.scales[:, self.index] * (self.values - self.zeros[:, self.index])


def round_weight(
    weight: Tensor, bits: int, group: int, *, symmetric: bool = False, order: Tensor | None = None
) -> Rounded:
    """Round to nearest. `order` [in] permutes which column belongs to which group."""
    width, top = weight.shape[1], 2**bits - 1
    index = torch.arange(width) // group
    index = index if order is None else index[order]
    scales, zeros = [], []
    for i in range(width // group):
        part = weight[:, index == i]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=1e-3)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / top).half().float()
        zero = torch.full_like(scale, (top + 1) // 2) if symmetric else (-low / scale).round()
        scales.append(scale)
        zeros.append(zero.clamp(1, top).long())
    scales_FG, zeros_FG = torch.stack(scales, 1), torch.stack(zeros, 1)
    values = (weight / scales_FG[:, index]).round().long() + zeros_FG[:, index]
    return Rounded(values.clamp(0, top), scales_FG, zeros_FG, index)


def words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Pack 32 / bits neighbours along `dim` into one int32, the first lowest; pads with 0."""
    if dim == 0:
        return words(values.t(), bits, 1).t().contiguous()
    per_word = 32 // bits
    padding = -values.shape[1] % per_word
    padded = torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, per_word))
    packed = (padded << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(rounded: Rounded, bits: int, *, zero_offset: int = 1) -> dict[str, Tensor]:
    return {
        "qweight": words(rounded.values.t().contiguous(), bits, 0),
        "qzeros": words((rounded.zeros - zero_offset).t().contiguous(), bits, 1),
        "scales": rounded.scales.t().half().contiguous(),
        "g_idx": rounded.index.int(),
    }


def awq(rounded: Rounded) -> dict[str, Tensor]:
    def shuffled(values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, 8))[:, :, list(AWQ_ROWS)].flatten(1)

    return {
        "qweight": words(shuffled(rounded.values.t()), 4, 1),
        "qzeros": words(shuffled(rounded.zeros.t()), 4, 1),
        "scales": rounded.scales.t().half().contiguous(),
    }


def int_quantized(rounded: Rounded, *, symmetric: bool) -> dict[str, Tensor]:
    tensors = {
        "weight": (rounded.values - 128).to(torch.int8),
        "weight_scale": rounded.scales.clone(),
    }
    zeros = (rounded.zeros - 128).to(torch.int8)
    return tensors if symmetric else tensors | {"weight_zero_point": zeros}


def pack_quantized(rounded: Rounded, bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(rounded.values, bits, 1),
        "weight_scale": rounded.scales.clone(),
        "weight_shape": torch.tensor(rounded.values.shape),
    }
    zeros = words(rounded.zeros, bits, 0)
    return tensors if symmetric else tensors | {"weight_zero_point": zeros}
