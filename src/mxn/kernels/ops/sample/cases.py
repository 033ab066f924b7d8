"""Parity cases of `sample`: masked tokens, broken rows, and the ends of the random range."""

from __future__ import annotations

from typing import Any

import torch

from mxn.kernels.parity import Case, Maker


def _build(make: Maker, rows: int, vocab: int, masked: float) -> tuple[Any, ...]:
    logits = make.normal32(rows, vocab, scale=2.0)
    logits[make.uniform32(rows, vocab) < masked] = float("-inf")
    uniform = make.uniform32(rows)
    if rows > 4:
        uniform[0], uniform[1] = 0.0, 1 - 2.0**-24
        logits[2], logits[3, vocab // 2] = float("-inf"), float("nan")
    return logits, uniform


CASES = (
    *(
        Case(
            name=f"sample R{r} V{v} masked {masked}",
            build=lambda make, a=(r, v, masked): _build(make, *a),
            dtypes=("float32",),
            is_typical=v == 2000,
        )
        for r, v, masked in (
            (0, 5, 0.0),
            (1, 1, 0.0),
            (7, 61, 0.0),
            (7, 61, 0.9),
            (16, 2000, 0.5),
        )
    ),
    Case(
        name="sample one token left",
        build=lambda make: (
            torch.full((3, 17), float("-inf")).scatter(1, make.integers(17, 3, 1), 0.0),
            make.uniform32(3),
        ),
        dtypes=("float32",),
    ),
)
