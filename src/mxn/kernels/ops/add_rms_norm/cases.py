"""Parity cases of `add_rms_norm`."""

import torch

from mxn.kernels.ops.rms_norm.cases import SHAPES
from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"add_rms_norm {shape} weight {'float32' if wide else 'like x'}",
        build=lambda make, shape=shape, wide=wide: (
            make.normal(*shape),
            make.normal(*shape, scale=3.0),
            make.normal(shape[-1], dtype=torch.float32 if wide else None),
            1e-5,
        ),
        is_typical=shape == (16, 1024),
        slack=1.5,  # two roundings to the dtype
    )
    for shape in SHAPES
    for wide in (False, True)
)
