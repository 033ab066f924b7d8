"""The truth of `choose`: the truths of its parts, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxn.kernels.ops.argmax.naive import argmax
from mxn.kernels.ops.filter_logits.naive import filter_logits
from mxn.kernels.ops.penalize.naive import penalize
from mxn.kernels.ops.sample.naive import sample
from mxn.kernels.params import ChoiceRule, LogitEdit


def choose(
    logits_RV: Tensor,
    num_tokens: int,
    rules: Sequence[ChoiceRule] | None = None,
    edits: Sequence[LogitEdit] = (),
) -> list[int]:
    edited_RV = logits_RV[:, :num_tokens].float().clone()
    for row, ids, repetition, subtract in edits:
        ids_M = torch.from_numpy(ids)
        repetition_M = torch.full((len(ids),), repetition)
        rows_M = torch.full_like(ids_M, row)
        penalize(edited_RV, rows_M, ids_M, repetition_M, torch.from_numpy(subtract))
    each = rules or [ChoiceRule()] * len(logits_RV)
    return [_one(row_V.unsqueeze(0), rule) for row_V, rule in zip(edited_RV, each, strict=True)]


def _one(row_1V: Tensor, rule: ChoiceRule) -> int:
    if rule.temperature == 0 or int(argmax(row_1V)) < 0:
        return int(argmax(row_1V))
    kept_1V, _, _ = filter_logits(
        row_1V,
        torch.tensor([rule.temperature]),
        torch.tensor([rule.top_k]),
        torch.tensor([rule.top_p]),
        torch.tensor([rule.min_p]),
    )
    return int(sample(kept_1V, torch.tensor([rule.uniform])))
