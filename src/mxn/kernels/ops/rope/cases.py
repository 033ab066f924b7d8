"""Parity cases of `rope`: whole and partial heads, both pairings, heads of a wider tensor."""

from __future__ import annotations

from typing import Any

import torch

from mxn.kernels.parity import Case, Maker


def _build(
    make: Maker, tokens: int, heads: int, groups: int, dim: int, half: int, interleaved: bool
) -> tuple[Any, ...]:
    wide = make.normal(tokens, (heads + groups) * dim + 3)
    q = wide[:, : heads * dim].unflatten(1, (heads, dim))
    k = wide[:, heads * dim : (heads + groups) * dim].unflatten(1, (groups, dim))
    angles = make.normal(tokens, half, scale=100.0, dtype=torch.float64)
    return q, k, angles.cos().float(), angles.sin().float(), interleaved


CASES = tuple(
    Case(
        name=f"rope T{t} N{n} G{g} H{h} R{r}{' interleaved' if inter else ''}",
        build=lambda make, a=(t, n, g, h, r, inter): _build(make, *a),
        is_typical=t == 16,
    )
    for t, n, g, h, r in (
        (0, 2, 1, 8, 4),
        (1, 1, 1, 2, 1),
        (7, 4, 2, 64, 32),
        (5, 3, 1, 22, 5),
        (16, 16, 8, 128, 64),
    )
    for inter in (False, True)
)
