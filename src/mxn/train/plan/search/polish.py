"""Small changes to a draft, for a climb under the full predictor. Start at `neighbours`.

The programs before it are exact for sum + (m - 1)·slowest; a real step is a little shorter when the
slowest stage stands at an end or micro-batches are few, and this finds what that leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mxn.train.plan.search.draft import Draft, Template

_FEW_PIPELINES = 8  # up to so many, single micro-batches are moved
_FEW_STAGES = 8  # up to so many, a stage may be left out


def neighbours(draft: Draft) -> Iterator[Draft]:
    """Yield drafts with one layer, one order, one stage or one micro-batch changed.

    `draft` has a line for each pipeline, and shares. Pipelines that are alike change together.
    """
    for line in dict.fromkeys(line for line, _ in draft.lines):
        for changed in (*_moved_layers(line), *_swapped_stages(line), *_shortened(line)):
            lines = tuple((changed if old == line else old, 1) for old, _ in draft.lines)
            yield replace(draft, lines=lines)
    if draft.shares is not None and 1 < len(draft.shares) <= _FEW_PIPELINES:
        yield from (replace(draft, shares=moved) for moved in _moved_shares(draft.shares))


def _moved_layers(line: Template) -> Iterator[Template]:
    for at in range(1, line.num_stages):
        for step in (-1, 1):
            bound = line.bounds[at] + step
            if line.bounds[at - 1] < bound < line.bounds[at + 1]:
                yield replace(line, bounds=(*line.bounds[:at], bound, *line.bounds[at + 1 :]))


def _swapped_stages(line: Template) -> Iterator[Template]:
    """Two neighbours of different kinds change places, each with its layers."""
    for at in range(line.num_stages - 1):
        a, b = line.kinds[at : at + 2]
        if a == b:
            continue
        size = line.bounds[at + 2] - line.bounds[at + 1]
        bounds = list(line.bounds)
        bounds[at + 1] = bounds[at] + size
        kinds = (*line.kinds[:at], b, a, *line.kinds[at + 2 :])
        yield replace(line, kinds=kinds, bounds=tuple(bounds))


def _shortened(line: Template) -> Iterator[Template]:
    """A stage of a short pipeline is left out; a neighbour takes its layers, and one hop is less"""
    if not 1 < line.num_stages <= _FEW_STAGES:
        return
    for at in range(line.num_stages):
        kinds = (*line.kinds[:at], *line.kinds[at + 1 :])
        for bound in {max(at, 1), min(at + 1, line.num_stages - 1)}:
            bounds = (*line.bounds[:bound], *line.bounds[bound + 1 :])
            yield replace(line, kinds=kinds, bounds=bounds)


def _moved_shares(shares: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for giver in range(len(shares)):
        for taker in range(len(shares)):
            if giver != taker and shares[giver] > 1:
                moved = list(shares)
                moved[giver] -= 1
                moved[taker] += 1
                yield tuple(moved)
