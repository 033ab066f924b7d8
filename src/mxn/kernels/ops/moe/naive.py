"""The truth of `moe`, token by token, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.ops.glu.naive import glu


def moe(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EFD: Tensor,
    down_EDI: Tensor,
    activation: str,
) -> Tensor:
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for t, experts in enumerate(ids_Tk.tolist()):
        for i, e in enumerate(experts):
            hidden = glu(gate_up_EFD[e].float() @ x_TD[t].float(), activation)
            out_TD[t] += weights_Tk[t, i] * (down_EDI[e].float() @ hidden)
    return out_TD.to(x_TD.dtype)
