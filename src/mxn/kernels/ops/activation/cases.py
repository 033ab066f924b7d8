"""Parity cases of `activation`."""

from mxn.kernels.parity import Case

KINDS = ("silu", "gelu", "gelu_tanh", "relu")

CASES = tuple(
    Case(
        name=f"activation {kind} {shape}",
        build=lambda make, shape=shape, kind=kind: (make.normal(*shape, scale=3.0), kind),
        is_typical=shape == (16, 3072),
    )
    for kind in KINDS
    for shape in ((0, 4), (1, 1), (3, 61), (16, 3072))
)
