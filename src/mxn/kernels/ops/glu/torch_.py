"""`glu` in torch, for any device."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.ops.activation.torch_ import activation as activate
from mxn.kernels.registry import kernel


@kernel("glu", name="torch")
def glu(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation) * up
