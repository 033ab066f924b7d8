"""Parity cases of `glu`."""

from mxn.kernels.ops.activation.cases import KINDS
from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"glu {kind} {shape}",
        build=lambda make, shape=shape, kind=kind: (make.normal(*shape, scale=3.0), kind),
        is_typical=shape == (16, 6144),
        slack=2.0,  # a kernel may round the activation before the product
    )
    for kind in KINDS
    for shape in ((0, 4), (1, 2), (3, 122), (2, 3, 34), (16, 6144))
)
