"""Parity cases of `token_logprobs`."""

from __future__ import annotations

from typing import Any

from mxn.kernels.parity import Case, Maker


def _build(make: Maker, rows: int, vocab: int, num_top: int) -> tuple[Any, ...]:
    return make.normal32(rows, vocab, scale=3.0), make.integers(vocab, rows), num_top


CASES = tuple(
    Case(
        name=f"token_logprobs R{r} V{v} top {n}",
        build=lambda make, a=(r, v, n): _build(make, *a),
        dtypes=("float32",),
        is_typical=r == 16,
    )
    for r, v, n in ((0, 3, 1), (1, 1, 1), (5, 61, 0), (5, 61, 7), (16, 2000, 20))
)
