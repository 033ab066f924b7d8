"""Parity cases of `pool`: padding holds NaN."""

from __future__ import annotations

from typing import Any

import torch

from mxn.kernels.parity import Case, Maker


def _build(make: Maker, lengths: tuple[int, ...], dim: int, kind: str) -> tuple[Any, ...]:
    x_BLD = make.normal(len(lengths), max(lengths, default=0) or 1, dim)
    for b, length in enumerate(lengths):
        x_BLD[b, length:] = float("nan")
    return x_BLD, torch.tensor(lengths, dtype=torch.int64), kind


CASES = tuple(
    Case(
        name=f"pool {kind} {lengths} D{d}",
        build=lambda make, a=(lengths, d, kind): _build(make, *a),
        is_typical=d == 384,
    )
    for kind in ("cls", "mean", "last")
    for lengths, d in (((), 4), ((1,), 1), ((7, 1, 3), 13), ((64, 50, 9), 384))
)
