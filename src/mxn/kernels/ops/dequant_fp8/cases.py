"""Parity cases of `dequant_fp8`, ragged edges included."""

from __future__ import annotations

from typing import Any

import torch

from mxn.kernels.parity import Case, Maker


def _build(make: Maker, rows: int, cols: int, block: tuple[int, int]) -> tuple[Any, ...]:
    # Packed on the CPU: rounding to e4m3 is part of the input, not of the op.
    weight = make.normal32(rows, cols, scale=30.0).to(torch.float8_e4m3fn)
    scales = make.uniform32(-(-rows // block[0]), -(-cols // block[1])) + 0.01
    return weight, scales, block, make.dtype


CASES = tuple(
    Case(
        name=f"dequant_fp8 {f}x{d} block {block}",
        build=lambda make, a=(f, d, block): _build(make, *a),
        is_typical=f == 256,
    )
    for f, d, block in (
        (0, 8, (4, 4)),
        (1, 1, (128, 128)),
        (13, 29, (4, 8)),
        (16, 32, (4, 8)),
        (256, 300, (128, 128)),
    )
)
