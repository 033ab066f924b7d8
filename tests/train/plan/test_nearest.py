"""What is said when nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mxn.errors import CapacityError
from mxn.train.plan.search import build, nearest, planner
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.order import Choice, Pool, _all_shards
from mxn.train.plan.search.planner import search
from mxn.train.plan.search.tables import TableBook
from support.plan_pools import TINY_MEMORY, chip, model, pool

PLAIN = Limits(schedules=("1f1b",), recompute=("none",), may_shard_optimizer=False, num_simulated=0)


@pytest.mark.parametrize("num_groups", [12, 64])
def test_the_widths_of_many_groups_are_not_all_listed(num_groups, monkeypatch):
    """Four widths of 64 groups are more choices than a machine could hold."""

    def refuse(*_):
        raise AssertionError("all choices are listed")

    monkeypatch.setattr(nearest, "product", refuse)
    widths = (1, 2, 4, 8)
    options = tuple(tuple(Kind(f"g{g}", tp) for tp in widths) for g in range(num_groups))
    found = nearest._choices(Pool(1, options))
    assert [{kind.tp for kind in kinds} for kinds in found] == [{tp} for tp in widths]


def test_the_widths_of_few_groups_are():
    options = ((Kind("a", 1), Kind("a", 2)), (Kind("b", 1), Kind("b", 4)))
    assert len(nearest._choices(Pool(1, options))) == 4


def asked(memory, *, num=2):
    """Ten layers of 4,000 bytes and 100 more for each micro-batch in flight; 8 rows, one chip."""
    shape = model(8)
    return shape, 8, pool({"a": num}, memory=memory), {"a": chip("a", 1.0, shape)}


def refused(memory, limits, **more):
    with pytest.raises(CapacityError) as caught:
        search(*asked(memory, **more), memory=TINY_MEMORY, limits=limits)
    assert caught.value.hint is not None
    return caught.value.message, caught.value.hint


def test_what_lacks_is_counted_under_the_schedule_that_is_allowed():
    """GPipe keeps all eight micro-batches: 24,000 bytes, where 1F1B's two take 21,000."""
    message, hint = refused(22_000, replace(PLAIN, schedules=("gpipe",)))
    assert "gpipe" in message
    assert "needs 23.4 KiB on each device, 1.95 KiB more than the 21.5 KiB" in message
    assert "schedule 1f1b (20.5 KiB instead" in hint


@pytest.mark.parametrize("schedule", ["zero-bubble", "interleaved"])
def test_the_nearest_plan_is_of_an_allowed_schedule(schedule):
    message, _ = refused(19_000, replace(PLAIN, schedules=(schedule,)))
    assert schedule in message
    assert "-" not in message.replace("micro-", "").replace(schedule, "")  # nothing lacks -5 KiB


def test_a_nearest_plan_that_fits_is_returned(monkeypatch):
    """Whatever the search did not look at."""
    monkeypatch.setattr(planner, "guided_search", lambda *_: None)
    monkeypatch.setattr(planner, "is_small", lambda *_: False)
    found = search(*asked(22_000), memory=TINY_MEMORY, limits=PLAIN)
    assert found.best.prediction.fits
    assert not found.is_exact


def test_memory_is_called_tight_by_what_the_schedule_keeps():
    """A pipeline of one stage keeps 8 micro-batches under GPipe, one under 1F1B."""
    shape, rows, cluster, profiles = asked(43_000)
    book = TableBook(Job(shape=shape, cluster=cluster, profiles=profiles, memory=TINY_MEMORY))
    choice = Choice(1, (Kind("a", 1),), 0.0)
    for schedule, shards in (("1f1b", [1]), ("gpipe", [1, 2])):
        limits = Limits(schedules=(schedule,))
        assert _all_shards(book, rows, choice, 2, limits) == shards


def test_a_help_is_judged_by_the_device_that_is_too_full():
    """Not by another one, which is the fullest then: that takes 19.8 KiB with recomputation."""
    shape = model(8)
    cluster = pool({"a": 1, "b": 1}, memory={"a": 20_000, "b": 19_700})
    profiles = {name: chip(name, 1.0, shape) for name in ("a", "b")}
    with pytest.raises(CapacityError, match="group 'a'") as caught:
        search(shape, 8, cluster, profiles, memory=TINY_MEMORY, limits=PLAIN)
    assert "full recomputation (19.9 KiB instead, not enough alone)" in str(caught.value.hint)


def test_deeper_pipelines_are_suggested_where_there_are_devices_for_them():
    limits = replace(PLAIN, max_stages=1)
    _, hint = refused(20_000, limits, num=2)
    assert hint.endswith("deeper than 1 stage")
    _, hint = refused(20_000, limits, num=1)
    assert hint.endswith("deeper than 1 stage over more devices")
    _, hint = refused(20_000, PLAIN, num=1)
    assert hint.endswith("more devices")
    assert "deeper" not in hint


def test_a_width_is_suggested_with_what_it_leaves_where_devices_are_free():
    shape = model(8)
    profiles = {"a": chip("a", 1.0, shape, tps=(1, 2))}
    narrow = replace(PLAIN, tps=(1,))
    for limits, is_told in ((replace(narrow, max_stages=1), True), (narrow, False)):
        with pytest.raises(CapacityError) as caught:
            search(
                shape, 8, pool({"a": 2}, memory=19_000), profiles, memory=TINY_MEMORY,
                limits=limits,
            )  # fmt: skip
        told = "tensor parallelism over 2 devices of 'a' (20 KiB instead, not enough alone)"
        assert (told in str(caught.value.hint)) == is_told


def test_of_many_choices_few_become_plans(monkeypatch):
    """The tables say which comes nearest; a plan is made to be sure of it."""
    made = []
    monkeypatch.setattr(nearest, "plan_of", lambda *args: made.append(args) or build.plan_of(*args))
    shape = model(8)
    cluster = pool({"a": 8, "b": 8}, memory=2_000)
    profiles = {name: chip(name, 1.0, shape, tps=(1, 2, 4)) for name in ("a", "b")}
    with pytest.raises(CapacityError):
        search(shape, 64, cluster, profiles, memory=TINY_MEMORY)
    assert 1 <= len(made) <= 8
