"""Parity cases of `choose`: each rule alone and all together, ties, odd rows, padding, edits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxn.kernels.params import ChoiceRule, LogitEdit
from mxn.kernels.parity import Case, Maker, Outputs

_PADDING = 5  # columns behind the tokens, which hold NaN


def _rule(make: Maker, tokens: int, wanted: str) -> ChoiceRule:
    numbers = make.uniform32(4).tolist()
    return ChoiceRule(
        temperature=0.5 + numbers[0] if wanted != "greedy" else 0.0,
        uniform=numbers[1],
        top_k=int(make.integers(tokens + 3, 1)) if "k" in wanted else 0,
        top_p=numbers[2] if "p" in wanted else 1.0,
        min_p=0.3 * numbers[3] if "m" in wanted else 0.0,
    )


def _build(
    make: Maker, rows: int, tokens: int, rules: tuple[str, ...], ties: bool, edits: int
) -> tuple[Any, ...]:
    logits = make.normal32(rows, tokens + _PADDING, scale=3.0)
    if ties:
        logits = logits.round()  # many equal logits, as bfloat16 gives them
    logits[:, tokens:] = math.nan
    each = [_rule(make, tokens, rules[r % len(rules)]) for r in range(rows)] if rules else None
    return logits, tokens, each, _edits(make, rows, tokens, edits)


def _edits(make: Maker, rows: int, tokens: int, num: int) -> list[LogitEdit]:
    """Return for every second row two edits that touch some tokens twice."""
    made = []
    for row in range(0, rows if num else 0, 2):
        for repetition in (1.3, 1.0):
            ids = make.permutation(tokens)[:num].numpy()
            made.append(LogitEdit(row, ids, repetition, make.normal32(len(ids)).numpy()))
    return made


def _odd(make: Maker, rule: str) -> tuple[Any, ...]:
    logits = make.normal32(9, 131)
    logits[0] = 1.0  # the first of equals, or any
    logits[1, 100] = logits[1, 12] = 90.0
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, 130] = math.nan
    logits[5, 0] = math.nan
    logits[6, :128] = -math.inf
    logits[7, 64:] = -math.inf
    logits[8] = -3e38
    rules = [_rule(make, 131, rule) for _ in range(9)]
    rules[1] = rules[1]._replace(uniform=1 - 2.0**-24)
    rules[7] = rules[7]._replace(uniform=0.0)
    return logits, 131, rules, ()


def _forbidding(make: Maker) -> tuple[Any, ...]:
    ids = np.arange(3, 70)
    subtract = np.full(67, math.inf, dtype=np.float32)
    rules = [ChoiceRule(1.0, 0.7), ChoiceRule(1.0, 0.7, top_p=0.9)]
    return make.normal32(2, 70), 70, rules, [LogitEdit(r, ids, 1.0, subtract) for r in range(2)]


def _tokens(args: tuple[Any, ...], result: list[int]) -> Outputs:
    """The logits of the call are an output too: they must be as they were."""
    logits: Tensor = args[0]
    return {"ids": torch.tensor(result, dtype=torch.int64), "logits": logits.cpu()}


def _case(name: str, build: Any, **options: Any) -> Case:
    return Case(name=name, build=build, outputs=_tokens, dtypes=("float32",), **options)


_RULES = ((), ("open",), ("k",), ("p",), ("m",), ("kpm",), ("greedy", "open", "p", "kp", "pm"))

CASES = (
    *(
        _case(
            f"choose R{r} V{v} {'+'.join(rules) or 'largest'} edits {e}{' ties' if t else ''}",
            lambda make, a=(r, v, rules, t, e): _build(make, *a),
        )
        for rules in _RULES
        for r, v, t, e in (
            (0, 5, False, 0),
            (1, 1, False, 1),
            (5, 61, True, 0),
            (6, 64, False, 20),
            (5, 1031, True, 0),
            (5, 5003, False, 300),
        )
    ),
    *(
        _case(
            f"choose R8 V32000 {rule}",
            lambda make, a=(8, 32000, (rule,), False, 0): _build(make, *a),
            is_typical=True,
        )
        for rule in ("greedy", "open", "kp", "p")
    ),
    *(
        _case(f"choose odd rows {rule}", lambda make, rule=rule: _odd(make, rule))
        for rule in ("greedy", "open", "k", "p", "m", "kpm")
    ),
    _case("choose few tokens are left", _forbidding),
)
