"""`moe` in torch, for any device: tokens sorted by expert, two products for each expert used."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.ops.glu.torch_ import glu
from mxn.kernels.registry import kernel


@kernel("moe", name="torch")
def moe(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EFD: Tensor,
    down_EDI: Tensor,
    activation: str,
) -> Tensor:
    linear = torch.nn.functional.linear
    flat_ids = ids_Tk.flatten()
    order = flat_ids.argsort(stable=True)
    tokens = order // ids_Tk.shape[1]
    # The one wait for the device: how many rows each expert has decides the shapes that follow.
    counts = torch.bincount(flat_ids, minlength=len(gate_up_EFD)).tolist()
    parts = []
    for expert, rows in enumerate(tokens.split(counts)):
        if len(rows):
            hidden = glu(linear(x_TD[rows], gate_up_EFD[expert]), activation)
            parts.append(linear(hidden, down_EDI[expert]))
    if not parts:
        return torch.zeros_like(x_TD)
    weighted = torch.cat(parts).float() * weights_Tk.flatten()[order].unsqueeze(1)
    # float32 sum in expert order, whatever the dtype: the result does not depend on the batch.
    total = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return total.index_add_(0, tokens, weighted).to(x_TD.dtype)
