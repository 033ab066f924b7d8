"""The truth of `glu`, computed in float32."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.ops.activation.naive import activation as activate


def glu(x: Tensor, activation: str) -> Tensor:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].float(), x[..., half:].float()
    return (activate(gate, activation) * up).to(x.dtype)
