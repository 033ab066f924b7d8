"""Parity cases of `argmax`: ties, infinities, NaN, rows inside a wider matrix."""

from __future__ import annotations

import math

from torch import Tensor

from mxn.kernels.parity import Case, Maker


def _rows(make: Maker, rows: int, width: int) -> tuple[Tensor]:
    return (make.normal(rows, width, scale=5.0),)


def _odd(make: Maker) -> tuple[Tensor]:
    logits = make.normal(7, 53)
    logits[0] = 1.0  # the first of equals
    logits[1, 40] = logits[1, 12] = 90.0
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, 52] = math.nan
    logits[5, 0] = math.nan
    logits[6, :50] = -math.inf
    return (logits,)


def _inside(make: Maker) -> tuple[Tensor]:
    return (make.normal(5, 64)[:, :41],)


CASES = (
    *(
        Case(
            name=f"argmax {rows}x{width}",
            build=lambda make, rows=rows, width=width: _rows(make, rows, width),
            is_typical=(rows, width) == (8, 32000),
        )
        for rows, width in ((0, 5), (1, 1), (3, 17), (2, 1031), (8, 32000))
    ),
    Case(name="argmax odd rows", build=_odd),
    Case(name="argmax inside a wider matrix", build=_inside),
)
