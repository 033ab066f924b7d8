"""Parity cases of `moe`, among them experts without tokens and a token with all experts."""

from __future__ import annotations

from typing import Any

import torch

from mxn.kernels.parity import Case, Maker


def _build(
    make: Maker, tokens: int, experts: int, top_k: int, dim: int, inner: int, kind: str
) -> tuple[Any, ...]:
    ids = torch.stack([make.permutation(experts)[:top_k] for _ in range(tokens)]) if tokens else (
        torch.zeros(0, top_k, dtype=torch.int64)
    )  # fmt: skip
    return (
        make.normal(tokens, dim),
        make.uniform32(tokens, top_k),
        ids,
        make.normal(experts, 2 * inner, dim, scale=dim**-0.5),
        make.normal(experts, dim, inner, scale=inner**-0.5),
        kind,
    )


CASES = tuple(
    Case(
        name=f"moe T{t} E{e} k{k} D{d} I{i} {kind}",
        build=lambda make, a=(t, e, k, d, i, kind): _build(make, *a),
        is_typical=t == 16,
        slack=3.0,  # two products and an activation, each of which may be rounded
    )
    for t, e, k, d, i, kind in (
        (0, 4, 2, 8, 8, "silu"),
        (1, 1, 1, 1, 1, "silu"),
        (1, 8, 2, 32, 48, "silu"),
        (13, 5, 5, 31, 17, "gelu_tanh"),
        (3, 32, 2, 16, 24, "silu"),
        (16, 8, 2, 64, 96, "silu"),
    )
)
