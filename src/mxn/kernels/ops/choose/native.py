"""`choose` in C++: rows are read where they lie, once or twice, and edits are taken back.

See `csrc/sample.cpp` for how candidates are found without a copy or a sort of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mxn.kernels.native.library import library, missing_reason, shared_pool
from mxn.kernels.params import ChoiceRule, LogitEdit
from mxn.kernels.registry import kernel


def _missing(_dtype: str) -> str | None:
    return missing_reason()


@kernel("choose", name="native", chips="x86*", dtypes=("float32",), priority=10, missing=_missing)
def choose(
    logits_RV: Tensor,
    num_tokens: int,
    rules: Sequence[ChoiceRule] | None = None,
    edits: Sequence[LogitEdit] = (),
) -> list[int]:
    row_stride, stride = logits_RV.stride()
    if stride != 1 or (row_stride < num_tokens and edits):  # rows that share memory
        logits_RV = logits_RV.contiguous()
        row_stride = logits_RV.shape[1]
    return library().choose(
        shared_pool(), logits_RV.data_ptr(), row_stride, logits_RV.shape[0], num_tokens, rules,
        edits,
    )  # fmt: skip
