"""Bounds and explanations hold together."""

from __future__ import annotations

import json

import pytest

from mxn.train.plan.bounds import bounds
from mxn.train.plan.explain import explain
from mxn.train.plan.search import planner
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.planner import search
from support.plan_pools import TINY_MEMORY, chip, model, pool

PLAIN = Limits(num_simulated=2)


def solved(sizes, speeds, *, rows=24, num_blocks=10, memory=10**9, between=1e6):
    shape = model(num_blocks)
    cluster = pool(sizes, memory=memory, between=between)
    profiles = {name: chip(name, speed, shape, tps=(1, 2)) for name, speed in speeds.items()}
    args = (shape, rows, cluster, profiles)
    found = search(*args, memory=TINY_MEMORY, limits=PLAIN)
    return found, bounds(*args, memory=TINY_MEMORY, limits=PLAIN), args


@pytest.mark.parametrize("memory", [10**9, 30_000, 16_000])
@pytest.mark.parametrize("between", [1e3, 1e6])
def test_nothing_is_faster_than_compute_alone(memory, between):
    found, bound, _ = solved({"a": 2, "b": 3}, {"a": 2.0, "b": 1.0}, memory=memory, between=between)
    for candidate in (found.best, *found.runners_up):
        _, strict = bound.ratios(candidate.prediction.tokens_per_s)
        assert 0 < strict <= 1 + 1e-9


def test_a_pool_of_one_group_reaches_its_own_bound():
    found, bound, _ = solved({"a": 4}, {"a": 1.0})
    ratio, strict = bound.ratios(found.best.prediction.tokens_per_s)
    assert ratio == pytest.approx(1.0)
    assert strict < 1


def test_the_bound_is_the_sum_of_the_groups_own_best_plans():
    _, bound, (shape, rows, cluster, profiles) = solved({"a": 2, "b": 3}, {"a": 2.0, "b": 1.0})
    total = 0.0
    for group in cluster.groups:
        alone = search(
            shape, rows, pool({group.name: group.num_devices}), profiles,
            memory=TINY_MEMORY, limits=PLAIN,
        )  # fmt: skip
        total += alone.best.prediction.tokens_per_s
    assert bound.tokens_per_s == pytest.approx(total, rel=1e-6)


def test_a_group_too_small_for_the_model_is_judged_at_a_larger_size():
    _, bound, _ = solved({"a": 4, "b": 1}, {"a": 1.0, "b": 1.0}, memory=20_000)
    small = next(group for group in bound.groups if group.group == "b")
    assert small.times > 1
    assert small.alone
    assert small.num_devices == 1


def test_a_bound_asks_for_no_reasons_where_a_group_is_too_small(monkeypatch):
    """They take a search of their own, and nobody reads them."""

    def refuse(*_):
        raise AssertionError("the nearest plan is looked for")

    monkeypatch.setattr(planner, "nearest", refuse)
    small = pool({"b": 1}, memory=20_000)
    shape = model(10)
    bound = bounds(shape, 24, small, {"b": chip("b", 1.0, shape)}, memory=TINY_MEMORY, limits=PLAIN)
    assert bound.groups[0].times > 1


def test_a_share_of_the_batch_gives_a_lower_bound_than_all_of_it():
    _, bound, args = solved({"a": 4, "b": 4}, {"a": 1.0, "b": 1.0}, memory=20_000)
    shared = bounds(*args, memory=TINY_MEMORY, limits=PLAIN, share_batch=True)
    assert shared.tokens_per_s <= bound.tokens_per_s
    assert shared.compute_tokens_per_s == bound.compute_tokens_per_s
    assert {group.rows for group in shared.groups} == {12}


@pytest.mark.parametrize("memory", [10**9, 20_000])
def test_the_shares_of_an_explanation_add_up_and_useful_is_the_strict_ratio(memory):
    found, bound, (shape, _, cluster, profiles) = solved(
        {"a": 2, "b": 2}, {"a": 2.0, "b": 1.0}, memory=memory
    )
    told = explain(found, shape, cluster, profiles, bound, memory=TINY_MEMORY)
    assert sum(told.shares.values()) == pytest.approx(1.0)
    assert told.shares["useful"] == pytest.approx(told.strict_ratio, abs=0.01)
    assert abs(told.shares["other"]) < 0.01
    assert all(share > -1e-9 for name, share in told.shares.items() if name != "other")


def test_an_explanation_is_text_and_json_with_margins_and_rivals():
    found, bound, (shape, _, cluster, profiles) = solved(
        {"a": 2, "b": 2}, {"a": 2.0, "b": 1.0}, memory=30_000
    )
    told = explain(found, shape, cluster, profiles, bound, memory=TINY_MEMORY)
    text = "\n".join(told.lines())
    assert "R' = " in text
    assert "R = " in text
    assert "free" in text
    assert {margin.group for margin in told.margins} <= {"a", "b"}
    data = json.loads(json.dumps(told.to_dict()))
    assert data["rivals"][0]["slower"] >= 0
    assert data["ratio"] == told.ratio


def test_more_rows_are_named_as_a_help_where_pipelines_are_filled_and_drained():
    found, bound, (shape, _, cluster, profiles) = solved(
        {"a": 4}, {"a": 1.0}, rows=4, memory=15_000
    )
    told = explain(found, shape, cluster, profiles, bound, memory=TINY_MEMORY)
    helps = dict(told.helps)
    assert helps["twice the rows a step"] > 0.01
