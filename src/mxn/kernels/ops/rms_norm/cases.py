"""Parity cases of `rms_norm`, with a weight of x's dtype and with a float32 one."""

import torch

from mxn.kernels.parity import Case

SHAPES = ((0, 16), (1, 1), (3, 61), (16, 128), (2, 5, 31), (16, 1024))

CASES = tuple(
    Case(
        name=f"rms_norm {shape} weight {'float32' if wide else 'like x'}",
        build=lambda make, shape=shape, wide=wide: (
            make.normal(*shape, scale=3.0),
            make.normal(shape[-1], dtype=torch.float32 if wide else None),
            1e-6,
        ),
        is_typical=shape == (16, 1024),
        slack=1.5,  # two roundings to the dtype
    )
    for shape in SHAPES
    for wide in (False, True)
)
