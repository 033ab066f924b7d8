"""`linear` through oneDNN with a weight packed once, for x86.

`torch.nn.functional.linear` packs (bfloat16) or walks (float32, MKL) the plain weight at every
call. One packing serves every number of rows: packed for 256 rows it was the fastest, or within
noise of it, from 1 to 256 rows on Zen 4 (table in docs/design/0002-operator-contract.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel

_PACKED_FOR_ROWS = 256


def _missing(dtype: str) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 products on this CPU"
    return None


class OneDnnLinear:
    """x[..., D] -> y[..., F]. Holds the packed weight only."""

    kernel = "onednn"
    __slots__ = ("_bias_F", "_packed", "in_features", "num_bytes", "out_features")

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight_FD.shape
        self.num_bytes = weight_FD.nbytes + (bias_F.nbytes if bias_F is not None else 0)
        self._bias_F = bias_F
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weight_FD.detach().contiguous(), _PACKED_FOR_ROWS
        )

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias_F, "none", [], "")


@kernel(
    "linear",
    name="onednn",
    chips="x86*",
    dtypes=("float32", "bfloat16"),
    priority=10,
    missing=_missing,
)
def linear(weight_FD: Tensor, bias_F: Tensor | None = None) -> OneDnnLinear:
    return OneDnnLinear(weight_FD, bias_F)
