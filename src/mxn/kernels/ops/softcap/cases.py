"""Parity cases of `softcap`."""

from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"softcap {shape}",
        build=lambda make, shape=shape: (make.normal(*shape, scale=40.0), 30.0),
        is_typical=shape == (16, 4096),
        slack=2.0,  # a kernel may round x / cap
    )
    for shape in ((0, 3), (1, 1), (3, 61), (16, 4096))
)
