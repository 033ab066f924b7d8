"""`mla_attention` in Triton: each latent row is read once, as key and as value.

Rows of short sequences run as in `paged_attention`; longer chunks go the way of `torch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.mla_attention.torch_ import prefill_chunks
from mxn.kernels.ops.paged_attention import triton_ as paged
from mxn.kernels.registry import kernel


@kernel(
    "mla_attention",
    name="triton",
    chips=host.CHIPS,
    dtypes=paged.DTYPES,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
    is_static=True,
)
def mla_attention(
    q_TNC: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, v_dim: int
) -> Tensor:
    out_TNW = torch.empty(*q_TNC.shape[:2], v_dim, dtype=q_TNC.dtype, device=q_TNC.device)
    rows, longest = paged.short_rows(batch)
    if rows is not None:
        paged.decode(out_TNW, q_TNC, cache, cache, batch.page_table_SP, rows, scale,
                     latent_dims=v_dim, max_context=longest,
                     page_tokens=batch.page_tokens)  # fmt: skip
    if not batch.is_decode:
        prefill_chunks(out_TNW, q_TNC, cache, batch, scale, least=paged.MAX_ROWS + 1)
    return out_TNW
