"""`rope` in Triton: queries and keys in one launch, each value read and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.registry import kernel

_TILE = 4096  # values of one step of the loop over heads


@kernel(
    "rope",
    name="triton",
    chips=host.CHIPS,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
)
def rope(
    q_TNH: Tensor, k_TGH: Tensor, cos_TR: Tensor, sin_TR: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    from mxn.kernels.triton_code import rope as code

    q_TNH, k_TGH = _dims_in_a_row(q_TNH), _dims_in_a_row(k_TGH)
    num_tokens, heads, dim = q_TNH.shape
    half = cos_TR.shape[1]
    q_out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    k_out = torch.empty(k_TGH.shape, dtype=k_TGH.dtype, device=k_TGH.device)
    width = host.power_of_two(half)
    host.launch(
        code.rotate,
        (num_tokens,),
        q_TNH,
        k_TGH,
        cos_TR.contiguous(),
        sin_TR.contiguous(),
        q_out,
        k_out,
        *q_TNH.stride()[:2],
        *k_TGH.stride()[:2],
        heads,
        k_TGH.shape[1],
        HEAD_DIM=dim,
        HALF=half,
        IS_INTERLEAVED=is_interleaved,
        BLOCK_N=min(host.power_of_two(heads), max(1, _TILE // width)),
        BLOCK_R=width,
        BLOCK_REST=host.power_of_two(dim - 2 * half),
        num_warps=4,
    )
    return q_out, k_out


def _dims_in_a_row(x_TNH: Tensor) -> Tensor:
    return x_TNH if x_TNH.stride(-1) == 1 else x_TNH.contiguous()
