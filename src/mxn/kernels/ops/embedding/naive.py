"""The truth of `embedding`."""

from __future__ import annotations

from torch import Tensor


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    out_TD = table_VD.new_empty(len(ids_T), table_VD.shape[1])
    for t, token in enumerate(ids_T.tolist()):
        out_TD[t] = table_VD[token]
    return out_TD
