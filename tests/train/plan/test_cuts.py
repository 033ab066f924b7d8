"""Cuts and shares against every possibility, on cases small enough to try them all."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.train.plan.search import cuts, shares


def tables(speeds, layers, limits, positions):
    """Busy tables of chips with a speed and room for so many layers, fewer towards the front."""
    work = np.concatenate([[0.0], np.cumsum(layers)])
    size = len(work)
    counts = np.subtract.outer(np.arange(size), np.arange(size)).T  # [a, e] -> e - a
    found = {}
    for kind, speed in enumerate(speeds):
        for at in range(positions):
            table = np.subtract.outer(work, work).T * speed
            room = limits[kind] - at  # a stage nearer to the front keeps more micro-batches
            found[kind, at] = np.where((counts >= 1) & (counts <= room), table, np.inf)
    return found


def every_cut(counts, busy, hops, num_layers):
    """All (sum, max) over all orders and cuts, by trying."""
    row = [kind for kind, count in enumerate(counts) for _ in range(count)]
    size = len(row)
    for order in set(permutations(row)):
        for inner in combinations(range(1, num_layers), size - 1):
            bounds = (0, *inner, num_layers)
            times = [busy[order[s], size - 1 - s][bounds[s], bounds[s + 1]] for s in range(size)]
            for s in range(size - 1):
                times[s] = times[s] + hops[order[s], order[s + 1]][bounds[s + 1]]
            yield sum(times), max(times)


def pareto(points):
    points = sorted({(round(a, 9), round(b, 9)) for a, b in points if np.isfinite(a)})
    front, best = [], np.inf
    for total, slowest in points:
        if slowest < best:
            front.append((total, slowest))
            best = slowest
    return front


CASE = st.tuples(
    st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=3),
    st.lists(st.sampled_from([1.0, 1.0, 0.5, 2.0]), min_size=2, max_size=6),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=9, max_size=9),
)


@settings(max_examples=60, deadline=None)
@given(CASE)
def test_fronts_are_those_of_trying_every_order_and_cut(case):
    speeds, layers, limits, counts, hop_values = case
    counts = tuple(counts[: len(speeds)])
    size = len(layers) + 1
    busy = tables(speeds, layers, limits, max(sum(counts), 1))
    hops = {
        (a, b): np.full(size, hop_values[3 * a + b])
        for a in range(len(speeds))
        for b in range(len(speeds))
    }
    found = cuts.fronts(counts, lambda k, at: busy[k, at], lambda a, b: hops[a, b])
    for chosen in np.ndindex(*(n + 1 for n in counts)):
        if not 0 < sum(chosen) <= len(layers):
            continue
        want = pareto(every_cut(chosen, busy, hops, len(layers)))
        got = [(round(c.sum_s, 9), round(c.max_s, 9)) for c in found.get(tuple(chosen), [])]
        assert got == want


@settings(max_examples=60, deadline=None)
@given(CASE)
def test_a_given_order_has_its_least_slowest_stage_first(case):
    speeds, layers, limits, _, hop_values = case
    busy = tables(speeds, layers, limits, len(speeds))
    order = list(range(len(speeds)))
    stage = [busy[k, len(order) - 1 - s] for s, k in enumerate(order)]
    hops = [np.full(len(layers) + 1, hop_values[s]) for s in range(len(order) - 1)]
    every = []
    for inner in combinations(range(1, len(layers)), len(order) - 1):
        bounds = (0, *inner, len(layers))
        times = [stage[s][bounds[s], bounds[s + 1]] for s in range(len(order))]
        times = [t + (hops[s][0] if s < len(hops) else 0) for s, t in enumerate(times)]
        every.append((sum(times), max(times)))
    front = pareto(every)
    got = cuts.best_in_order(order, stage, hops)
    if not front:
        assert got == []
        return
    assert (round(got[0].sum_s, 9), round(got[0].max_s, 9)) == front[-1]
    assert got[-1].sum_s == pytest.approx(front[0][0])


PACES = st.lists(
    st.builds(shares.Pace, st.sampled_from([0.0, 0.5, 3.0]), st.floats(0.1, 5.0)),
    min_size=1,
    max_size=4,
)


def every_split(num, total):
    if num == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in every_split(num - 1, total - first):
            yield (first, *rest)


@settings(max_examples=80, deadline=None)
@given(PACES, st.integers(1, 9))
def test_shares_end_as_early_as_any_split(paces, total):
    got = shares.split(paces, total)
    assert sum(got) == total
    best = min(shares.finish_s(paces, s) for s in every_split(len(paces), total))
    assert shares.finish_s(paces, got) == pytest.approx(best)


def test_a_million_micro_batches_are_split_at_once_and_exactly():
    paces = [shares.Pace(0.0, 1.0), shares.Pace(0.0, 2.0), shares.Pace(5.0, 4.0)]
    got = shares.split(paces, 1_000_000)
    assert sum(got) == 1_000_000
    ends = [pace.time_s(n) for pace, n in zip(paces, got, strict=True)]
    assert max(ends) - min(pace.time_s(n + 1) for pace, n in zip(paces, got, strict=True)) <= 0
