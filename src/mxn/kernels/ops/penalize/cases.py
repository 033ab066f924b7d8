"""Parity cases of `penalize`."""

from __future__ import annotations

from typing import Any

from mxn.kernels.parity import Case, Maker


def _build(make: Maker, rows: int, vocab: int, pairs: int) -> tuple[Any, ...]:
    places = make.permutation(rows * vocab)[:pairs]
    return (
        make.normal32(rows, vocab, scale=4.0),
        places // vocab,
        places % vocab,
        make.uniform32(pairs) + 0.5,
        make.normal32(pairs),
    )


CASES = tuple(
    Case(
        name=f"penalize R{r} V{v} M{m}",
        build=lambda make, a=(r, v, m): _build(make, *a),
        dtypes=("float32",),
        is_typical=r == 16,
    )
    for r, v, m in ((1, 1, 1), (3, 61, 0), (3, 61, 40), (16, 1000, 500))
)
