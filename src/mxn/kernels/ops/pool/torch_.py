"""`pool` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.errors import UnsupportedError
from mxn.kernels.registry import kernel


@kernel("pool", name="torch")
def pool(x_BLD: Tensor, lengths_B: Tensor, kind: str) -> Tensor:
    """Raises: UnsupportedError for a kind other than cls, mean, last."""
    if kind == "cls":
        return x_BLD[:, 0]
    if kind == "last":
        rows = torch.arange(len(x_BLD), device=x_BLD.device)
        return x_BLD[rows, (lengths_B - 1).clamp_min(0)]
    if kind != "mean":
        raise UnsupportedError(f"pooling {kind!r} is none of cls, mean, last")
    positions = torch.arange(x_BLD.shape[1], device=x_BLD.device)
    inside = (positions < lengths_B.unsqueeze(1)).unsqueeze(-1)
    # where, not a product with the mask: padding may hold anything.
    total = torch.where(inside, x_BLD.float(), 0.0).sum(1)
    return (total / lengths_B.clamp_min(1).unsqueeze(1)).to(x_BLD.dtype)
