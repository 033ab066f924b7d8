"""Copies of one pipeline over several groups: the family whose gradients stay inside groups.

Start at `alike`. The number of copies decides each group's width, since slots must divide well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from math import prod

from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.rough import Rough, WaysOf, draft_of
from mxn.train.plan.search.ways import Ways

_FEW_WIDTHS = 150  # combinations of widths: up to so many, all are tried
_FEW_COPIES = 4  # with each of them
_NUM_ALIKE = 12  # numbers of like pipelines that are cut exactly


def alike(
    ways_of: WaysOf, options: Sequence[Sequence[Kind]], *, sharded: bool, experts: int = 1
) -> list[Rough]:
    """Return copies of one pipeline, each group with the width that suits the number of copies.

    Like stages of all copies stand in one group, so no sum of gradients leaves it. The optimizer
    state is shared by all copies if `sharded`, the experts of a layer by `experts` of them.
    """

    def ways(num: int) -> Ways:
        return ways_of(num if sharded else 1, experts)

    found: list[Rough] = []
    if prod(len(of) + 1 for of in options) <= _FEW_WIDTHS:
        found += _alike_by_width(ways, options, experts)
    for narrowest in sorted({kind.tp for of in options for kind in of}):
        wide = [[k for k in of if k.tp >= narrowest] or [max(of, key=_width)] for of in options]
        found += _alike(ways, wide, experts)
    return sorted(found, key=lambda draft: draft.estimate_s)


def _alike_by_width(
    ways_of: Callable[[int], Ways], options: Sequence[Sequence[Kind]], experts: int
) -> list[Rough]:
    """Return a few copies of one pipeline, or one alone, with any widths and groups left out."""
    plain = ways_of(1)
    found: list[Rough] = []
    for kinds in product(*((None, *of) for of in options)):
        slots = {kind: plain.tables.job.num_slots(kind) for kind in kinds if kind}
        for num in range(experts, min(_FEW_COPIES, plain.micro_batches) + 1, experts):
            counts = Counter({kind: n // num for kind, n in slots.items() if n // num})
            ways = ways_of(num)
            way = ways.rough(counts) if counts and depth_fits(ways, counts) else None
            draft = draft_of(ways, ((way, num),), "copies of one pipeline") if way else None
            if draft is not None:
                found.append(draft)
    return found


def _alike(
    ways_of: Callable[[int], Ways], options: Sequence[Sequence[Kind]], experts: int
) -> list[Rough]:
    plain = ways_of(1)
    ranked: list[tuple[float, int, Counter[Kind]]] = []
    most = sum(max(plain.tables.job.num_slots(kind) for kind in of) for of in options)
    for num in range(max(2, experts), min(most, plain.micro_batches) + 1):
        if num % experts:
            continue
        counts = _like_shares(plain, options, num)
        depth = sum(counts.values())
        if 0 < depth <= plain.max_stages:
            rate = num * sum(n / plain.tables.work_s(kind) for kind, n in counts.items())
            bubble = (depth - 1) * num / plain.micro_batches * plain.fill
            ranked.append(((1 + bubble) / rate, num, counts))
    found: list[Rough] = []
    for _, num, counts in sorted(ranked, key=lambda entry: entry[:2]):
        if len(found) == _NUM_ALIKE:
            break
        ways = ways_of(num)
        way = ways.rough(counts) if depth_fits(ways, counts) else None
        draft = draft_of(ways, ((way, num),), "copies of one pipeline") if way else None
        if draft is not None:
            found.append(draft)
    return found


def _width(kind: Kind) -> int:
    return kind.tp


def depth_fits(ways: Ways, counts: Counter[Kind]) -> bool:
    """Return whether so many slots could hold the model at all."""
    return ways.shallowest(counts) <= sum(counts.values())


def _like_shares(ways: Ways, options: Sequence[Sequence[Kind]], num: int) -> Counter[Kind]:
    counts: Counter[Kind] = Counter()
    for of in options:
        shares = {kind: ways.tables.job.num_slots(kind) // num for kind in of}
        kind = max(of, key=lambda k: (shares[k] / ways.tables.work_s(k), -k.tp))
        if shares[kind]:
            counts[kind] = shares[kind]
    return counts
