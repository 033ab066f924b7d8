"""The truth of `linear`: products and sums in float32."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def linear(weight_FD: Tensor, bias_F: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        y = (x.unsqueeze(-2).float() * weight_FD.float()).sum(-1)
        if bias_F is not None:
            y = y + bias_F.float()
        return y.to(x.dtype)

    apply.kernel = "naive"
    apply.out_features, apply.in_features = weight_FD.shape
    apply.num_bytes = weight_FD.nbytes + (bias_F.nbytes if bias_F is not None else 0)
    return apply
