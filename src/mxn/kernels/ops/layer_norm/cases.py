"""Parity cases of `layer_norm`."""

from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"layer_norm {shape} {'plain' if bare else 'affine'}",
        build=lambda make, shape=shape, bare=bare: (
            make.normal(*shape, scale=3.0) + 1.0,
            None if bare else make.normal(shape[-1]),
            None if bare else make.normal(shape[-1]),
            1e-12,
        ),
        is_typical=shape == (16, 384),
    )
    for shape in ((0, 16), (1, 2), (3, 61), (2, 5, 31), (16, 384))
    for bare in (False, True)
)
