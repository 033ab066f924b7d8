"""How good predictions are: errors, rank order, and what a wrong choice would cost.

Knows two rows of numbers. Start at `scores`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def scores(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Return MAPE, median and worst error, and Spearman's rank correlation; errors as shares."""
    errors = sorted(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    return {
        "rows": float(len(errors)),
        "mape": sum(errors) / len(errors),
        "median": errors[len(errors) // 2],
        "worst": errors[-1],
        "spearman": spearman(predicted, measured),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the correlation of the ranks; ties share their mean rank."""
    ra, rb = _ranks(a), _ranks(b)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(ra, rb, strict=True))
    low = math.sqrt(sum((x - mean) ** 2 for x in ra) * sum((y - mean) ** 2 for y in rb))
    return top / low if low else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for i in order[at:end]:
            ranks[i] = (at + end + 1) / 2
        at = end
    return ranks


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return how much longer than the best the choice with the least prediction takes, as a share.

    Raises: ValueError for no rows.
    """
    chosen = min(range(len(predicted)), key=predicted.__getitem__)
    return measured[chosen] / min(measured) - 1
