"""The truth of `activation`, computed in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def activation(x: Tensor, kind: str) -> Tensor:
    wide = x.float()
    if kind == "silu":
        out = wide / (1 + (-wide).exp())
    elif kind == "gelu":
        out = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    elif kind == "gelu_tanh":
        out = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    elif kind == "relu":
        out = torch.where(wide > 0, wide, 0.0)
    else:
        raise ValueError(f"unknown activation {kind!r}")
    return out.to(x.dtype)
