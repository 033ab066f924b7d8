"""`choose` in torch, for any device, from the ops it is made of.

Rows that want a filter are tried with few candidates; the rare row that needs more runs again with
more, because sorting a whole vocabulary costs more than the rest of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mxn.kernels.ops.argmax.torch_ import argmax
from mxn.kernels.ops.filter_logits.torch_ import filter_logits
from mxn.kernels.ops.penalize.torch_ import penalize
from mxn.kernels.ops.sample.torch_ import sample
from mxn.kernels.params import ChoiceRule, LogitEdit
from mxn.kernels.registry import kernel

_FEW_CANDIDATES = 256  # nearly always hold all that top-p or min-p keep
_MANY_CANDIDATES = 8192
_TIES = 8  # room for ties behind the k-th candidate


@kernel("choose", name="torch")
def choose(
    logits_RV: Tensor,
    num_tokens: int,
    rules: Sequence[ChoiceRule] | None = None,
    edits: Sequence[LogitEdit] = (),
) -> list[int]:
    logits_RV = logits_RV[:, :num_tokens]
    if edits:
        logits_RV = logits_RV.clone()
        for repeated in _each_token_once(edits):
            _penalize(logits_RV, repeated)
    open_rows: list[int] = []
    filtered_rows: list[int] = []
    for row, rule in enumerate(rules or ()):
        if rule.temperature > 0:
            (filtered_rows if rule.has_filter else open_rows).append(row)
    if not rules or len(open_rows) + len(filtered_rows) < len(rules):
        ids = argmax(logits_RV).tolist()
    else:
        ids = [-1] * len(rules)
    for rows, draw in ((open_rows, _draw_open), (filtered_rows, _draw_filtered)):
        if rows and rules:
            some_RV = _rows_of(logits_RV, rows)
            for row, token in zip(rows, draw(some_RV, [rules[r] for r in rows]), strict=True):
                ids[row] = token
    return ids


def _rows_of(logits_RV: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(logits_RV):
        return logits_RV
    return logits_RV[torch.tensor(rows, device=logits_RV.device)]


def _each_token_once(edits: Sequence[LogitEdit]) -> list[list[LogitEdit]]:
    """Return the edits in rounds that hold each row once, in order."""
    rounds: list[dict[int, LogitEdit]] = []
    seen: dict[int, int] = {}
    for edit in edits:
        number = seen.get(edit.row, 0)
        seen[edit.row] = number + 1
        if number == len(rounds):
            rounds.append({})
        rounds[number][edit.row] = edit
    return [list(found.values()) for found in rounds]


def _penalize(logits_RV: Tensor, edits: list[LogitEdit]) -> None:
    sizes = [len(edit.ids) for edit in edits]
    arrays = (
        np.repeat([edit.row for edit in edits], sizes),
        np.concatenate([edit.ids for edit in edits]),
        np.repeat(np.array([edit.repetition for edit in edits], np.float32), sizes),
        np.concatenate([edit.subtract for edit in edits]),
    )
    penalize(logits_RV, *(torch.from_numpy(array).to(logits_RV.device) for array in arrays))


def _draw_open(logits_RV: Tensor, rules: list[ChoiceRule]) -> list[int]:
    numbers = [[rule.temperature, rule.uniform] for rule in rules]
    temperature_R, uniform_R = torch.tensor(numbers, device=logits_RV.device).unbind(1)
    return sample(logits_RV / temperature_R.unsqueeze(1), uniform_R).tolist()


def _draw_filtered(logits_RV: Tensor, rules: list[ChoiceRule]) -> list[int]:
    ids = [-1] * len(rules)
    rows = list(range(len(rules)))
    for num_candidates in (_num_candidates(rules), _MANY_CANDIDATES, None):
        found, is_exact = _draw_once(logits_RV, [rules[row] for row in rows], num_candidates)
        for row, token in zip(rows, found, strict=True):
            ids[row] = token
        again = [i for i, exact in enumerate(is_exact) if not exact]
        if not again:
            break
        rows = [rows[i] for i in again]
        logits_RV = logits_RV[torch.tensor(again, device=logits_RV.device)]
    return ids


def _num_candidates(rules: list[ChoiceRule]) -> int:
    """Return how many of a row's best logits should do to decide its filters."""
    most = 1 + max(rule.top_k for rule in rules) + _TIES
    return max(most, _FEW_CANDIDATES) if any(rule.top_k <= 0 for rule in rules) else most


def _draw_once(
    logits_RV: Tensor, rules: list[ChoiceRule], num_candidates: int | None
) -> tuple[list[int], list[int]]:
    """Return a token for each row, and for which rows the candidates were enough."""
    device = logits_RV.device
    numbers = [[rule.temperature, rule.uniform, rule.top_p, rule.min_p] for rule in rules]
    temperature_R, uniform_R, top_p_R, min_p_R = torch.tensor(numbers, device=device).unbind(1)
    has_k = any(rule.top_k > 0 for rule in rules)
    kept_RC, ids_RC, is_exact_R = filter_logits(
        logits_RV,
        temperature_R,
        torch.tensor([rule.top_k for rule in rules], device=device) if has_k else None,
        top_p_R if any(rule.top_p < 1 for rule in rules) else None,
        min_p_R if any(rule.min_p > 0 for rule in rules) else None,
        num_candidates,
    )
    picked_R = sample(kept_RC, uniform_R)
    ids_R = ids_RC.gather(1, picked_R.clamp_min(0).unsqueeze(1)).squeeze(1)
    ids_R = torch.where(picked_R < 0, -1, ids_R)
    ids, is_exact = torch.stack((ids_R, is_exact_R.to(ids_R.dtype))).tolist()
    return ids, is_exact
