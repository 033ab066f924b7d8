"""`rms_norm` in Triton: one pass over each row. Also the host side of `add_rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.registry import kernel

_MAX_DIMS = 1 << 15  # a row stays in the registers of one program


def takes(x: Tensor, *_: object) -> bool:
    return x.shape[-1] <= _MAX_DIMS


@kernel(
    "rms_norm",
    name="triton",
    chips=host.CHIPS,
    shapes=takes,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
)
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return norm_rows(x, None, weight_D, eps)[0]


def norm_rows(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return the normed rows of x, or of x + residual, and that sum; shapes as x [..., D]."""
    from mxn.kernels.triton_code import norm

    dims = x.shape[-1]
    rows = _rows(x)
    more = rows if residual is None else _rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    host.launch(
        norm.norm_rows,
        (len(rows),),
        rows,
        more,
        weight_D.contiguous(),
        normed,
        normed if total is None else total,
        rows.stride(0),
        more.stride(0),
        dims,
        eps,
        HAS_RESIDUAL=residual is not None,
        IS_WIDE_WEIGHT=weight_D.dtype == torch.float32,
        BLOCK=host.power_of_two(dims),
        num_warps=min(16, host.power_of_two(host.ceil_div(dims, 512))),
    )
    return normed, total


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
