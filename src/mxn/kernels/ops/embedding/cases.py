"""Parity cases of `embedding`."""

from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"embedding T{t} V{v} D{d}",
        build=lambda make, t=t, v=v, d=d: (make.integers(v, t), make.normal(v, d)),
        is_typical=t == 16,
    )
    for t, v, d in ((0, 7, 8), (1, 1, 1), (5, 97, 61), (16, 1000, 256))
)
