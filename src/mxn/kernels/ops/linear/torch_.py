"""`linear` as torch does it, for any device. The weight stays as it is stored in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


class TorchLinear:
    """x[..., D] -> y[..., F] through `torch.nn.functional.linear`."""

    kernel = "torch"
    __slots__ = ("bias_F", "in_features", "num_bytes", "out_features", "weight_FD")

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        self.weight_FD = weight_FD
        self.bias_F = bias_F
        self.out_features, self.in_features = weight_FD.shape
        self.num_bytes = weight_FD.nbytes + (bias_F.nbytes if bias_F is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight_FD, self.bias_F)


@kernel("linear", name="torch")
def linear(weight_FD: Tensor, bias_F: Tensor | None = None) -> TorchLinear:
    return TorchLinear(weight_FD, bias_F)
