"""The predictor's closed forms over many cuts at once: `closed.pipeline_time` on arrays.

Each argument has one array per stage (hops: per border), with an entry for each cut. Knows only
seconds. Start at `pipelines_s`; a test holds it to `closed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mxn.train.plan.plan import Schedule

Row = NDArray[np.float64]
Rows = Sequence[Row]


def pipelines_s(
    schedule: Schedule, forward: Rows, backward: Rows, weight: Rows, hops: Rows, count: int
) -> Row:
    """Return the seconds of `count` micro-batches; `hops` are both ways. One chunk per stage."""
    if schedule == "gpipe":
        return _gpipe(forward, hops, count) + _gpipe(backward, hops, count)
    busy = [f + b for f, b in zip(forward, backward, strict=True)]
    if schedule == "zero-bubble":
        return _zero_bubble(busy, weight, hops, count)
    return _one_f_one_b(forward, backward, busy, hops, count)


def _gpipe(times: Rows, hops: Rows, count: int) -> Row:
    one_way = [hop / 2 for hop in hops]
    total = np.sum([*times, *one_way], axis=0)
    return total + (count - 1) * np.maximum.reduce([*times, *one_way])


def _zero_bubble(busy: Rows, weight: Rows, hops: Rows, count: int) -> Row:
    idle = [np.maximum(b - 2 * w, 0.0) for b, w in zip(busy, weight, strict=True)]
    rest = np.sum([*idle, *hops], axis=0)
    return np.maximum.reduce([count * b + rest - i for b, i in zip(busy, idle, strict=True)])


def _one_f_one_b(forward: Rows, backward: Rows, busy: Rows, hops: Rows, count: int) -> Row:
    size = len(busy)
    waits = _waits(forward, backward, busy, hops, count)
    worst = np.zeros_like(busy[0])
    before = np.zeros_like(busy[0])
    for s in range(size):
        through, widest = busy[s], busy[s]
        for t in range(s, size):
            if t > s:
                through = through + busy[t] + hops[t - 1]
                widest = np.maximum(widest, busy[t])
            rounds, rest = divmod(count - 1, t - s + 1)
            total = before + through * (1 + rounds) + rest * widest + waits[t]
            worst = np.maximum(worst, total)
        if s < size - 1:
            before = before + busy[s] + hops[s]
    return worst


def _waits(forward: Rows, backward: Rows, busy: Rows, hops: Rows, count: int) -> list[Row]:
    """Return how long each stage stands still for the rest of the pipeline."""
    size = len(busy)
    after = np.zeros_like(busy[0])
    found: list[Row] = []
    for t in range(size - 1, -1, -1):
        if t < size - 1:
            after = after + busy[t + 1] + hops[t]
        spare = min(count, size - t) - 1
        first = np.maximum(after - spare * forward[t], 0.0)
        last = np.maximum(after - spare * backward[t], 0.0)
        is_long = count > size - t
        found.append(np.minimum(first + last, after) if is_long else np.maximum(first, last))
    return found[::-1]
