"""`add_rms_norm` in Triton: the sum is written and normed in one pass."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.ops.rms_norm import triton_ as norms
from mxn.kernels.registry import kernel


@kernel(
    "add_rms_norm",
    name="triton",
    chips=host.CHIPS,
    shapes=norms.takes,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, total = norms.norm_rows(x, residual, weight_D, eps)
    assert total is not None
    return normed, total
