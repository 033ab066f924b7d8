"""`argmax` in C++, on the threads of the native kernels: rows are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.native.library import library, missing_reason, shared_pool
from mxn.kernels.registry import kernel


def _missing(_dtype: str) -> str | None:
    return missing_reason()


@kernel("argmax", name="native", chips="x86*", dtypes=("float32",), priority=10, missing=_missing)
def argmax(logits_RV: Tensor) -> Tensor:
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    ids_R = torch.empty(len(logits_RV), dtype=torch.int64)
    library().argmax(
        shared_pool(), logits_RV.data_ptr(), logits_RV.stride(0), len(logits_RV),
        logits_RV.shape[1], ids_R.data_ptr(),
    )  # fmt: skip
    return ids_R
