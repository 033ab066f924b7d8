"""Parity cases of `dense_attention`; only rows inside a sequence's length are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxn.kernels.parity import Case, Maker, Outputs


def _build(make: Maker, lengths: tuple[int, ...], heads: int, dim: int) -> tuple[Any, ...]:
    longest = max(lengths, default=0)
    q, k, v = (make.normal(len(lengths), longest, heads, dim).transpose(1, 2) for _ in range(3))
    return q, k, v, torch.tensor(lengths, dtype=torch.int64), dim**-0.5


def _inside(args: tuple[Any, ...], out_BNLH: Tensor) -> Outputs:
    lengths = args[3].tolist()
    rows = {f"out[{b}]": out_BNLH[b, :, :length] for b, length in enumerate(lengths)}
    return rows | {"is_finite": out_BNLH.isfinite().all()}


CASES = tuple(
    Case(
        name=f"dense_attention {lengths} N{n} H{h}",
        build=lambda make, a=(lengths, n, h): _build(make, *a),
        outputs=_inside,
        is_typical=lengths == (128, 90, 128, 61),
        slack=2.0,  # probabilities may be rounded before they weigh the values
    )
    for lengths, n, h in (
        ((), 2, 8),
        ((1,), 1, 1),
        ((7, 3, 1), 3, 13),
        ((16, 16), 2, 32),
        ((128, 90, 128, 61), 12, 32),
    )
)
