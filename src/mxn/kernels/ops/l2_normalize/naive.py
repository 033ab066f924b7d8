"""The truth of `l2_normalize`."""

from __future__ import annotations

from torch import Tensor


def l2_normalize(x: Tensor) -> Tensor:
    wide = x.float()
    length = (wide * wide).sum(-1, keepdim=True).sqrt()
    return (wide / length.clamp_min(1e-12)).to(x.dtype)
