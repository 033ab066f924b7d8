"""The truth of `layer_norm`."""

from __future__ import annotations

from torch import Tensor


def layer_norm(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    if weight_D is not None:
        normed = normed * weight_D.float()
    if bias_D is not None:
        normed = normed + bias_D.float()
    return normed.to(x.dtype)
