"""Parity cases of `filter_logits`: each rule alone, all together, ties, and few candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxn.kernels.ops.filter_logits.naive import filter_logits
from mxn.kernels.parity import Case, Maker, Outputs


def _build(
    make: Maker, rows: int, vocab: int, rules: str, num_candidates: int | None, ties: bool
) -> tuple[Any, ...]:
    logits = make.normal32(rows, vocab, scale=3.0)
    if ties:
        logits = logits.round()  # many equal logits, as bfloat16 gives them
    top_k = make.integers(vocab + 3, rows) if "k" in rules else None
    top_p = make.uniform32(rows) if "p" in rules else None
    min_p = make.uniform32(rows) * 0.3 if "m" in rules else None
    if rows > 2:  # one row that does not ask for the rule
        for rule, off in ((top_k, 0), (top_p, 1.0), (min_p, 0.0)):
            if rule is not None:
                rule[1] = off
    return logits, make.uniform32(rows) + 0.5, top_k, top_p, min_p, num_candidates


def _decided(args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> Outputs:
    """Spread the candidates over the vocabulary; rows that stayed undecided take the truth."""
    kept, ids, is_exact = (part.cpu() for part in result)
    logits = args[0].cpu()
    spread = torch.full_like(logits, float("-inf")).scatter(1, ids, kept)
    whole, _, _ = filter_logits(logits, *(None if a is None else a.cpu() for a in args[1:5]))
    in_order = (ids.diff(dim=1) > 0).all()
    return {
        "filtered": torch.where(is_exact.unsqueeze(1), spread, whole),
        "ids are in order": in_order,
        "all exact": is_exact.all() if args[5] is None else torch.tensor(True),
    }


CASES = tuple(
    Case(
        name=f"filter_logits R{r} V{v} {rules or 'nothing'} candidates {c}{' ties' if t else ''}",
        build=lambda make, a=(r, v, rules, c, t): _build(make, *a),
        outputs=_decided,
        dtypes=("float32",),
        is_typical=v == 2000,
    )
    for rules in ("", "k", "p", "m", "kpm")
    for r, v, c, t in (
        (1, 1, None, False),
        (5, 61, None, False),
        (5, 61, None, True),
        (5, 61, 9, False),
        (5, 61, 9, True),
        (4, 2000, 256, False),
    )
)
