"""The planner finds what trying everything finds, obeys memory, and follows profiles and links."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import CapacityError, UserError
from mxn.train.plan.predict import predict
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.planner import search
from mxn.train.plan.sets import sailor
from support.plan_pools import TINY_MEMORY, chip, every_plan, model, pool

SAILOR = Path(__file__).parents[2] / "data" / "training" / "sailor"
PLAIN = Limits(schedules=("1f1b",), recompute=("none",), may_shard_optimizer=False, num_simulated=0)


def find(shape, rows, cluster, profiles, limits=PLAIN):
    return search(shape, rows, cluster, profiles, memory=TINY_MEMORY, limits=limits)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([{"a": 1, "b": 1}, {"a": 1, "b": 2}]),
    st.just(2),
    st.sampled_from([1e4, 1e6]),
    st.sampled_from([10**9, 20_000, 14_000]),
    st.integers(2, 4),
)
def test_no_plan_of_a_small_pool_is_quicker(speed, sizes, num_blocks, between, memory, rows):
    shape = model(num_blocks)
    cluster = pool(sizes, between=between, memory=memory)
    profiles = {"a": chip("a", speed, shape), "b": chip("b", 1.0, shape)}
    seen = (
        predict(plan, shape, cluster, profiles, memory=TINY_MEMORY)
        for plan in every_plan(shape, cluster, rows)
    )
    best = min((p.iteration_s for p in seen if p.fits), default=None)
    if best is None:
        with pytest.raises(CapacityError):
            find(shape, rows, cluster, profiles)
        return
    found = find(shape, rows, cluster, profiles)
    assert found.is_exact
    assert found.best.prediction.iteration_s <= best * 1.02


def test_a_chip_of_twice_the_speed_does_twice_the_micro_batches():
    shape = model(4)
    profiles = {"a": chip("a", 2.0, shape), "b": chip("b", 1.0, shape)}
    found = find(shape, 12, pool({"a": 1, "b": 1}), profiles)
    shares = {p.stages[0].group: p.micro_batches for p in found.best.plan.pipelines}
    assert shares == {"a": 8, "b": 4}


def test_a_model_too_large_for_a_chip_is_cut_where_speeds_say():
    shape = model(10, head=0.9)  # with the embedding eleven blocks of work
    profiles = {"a": chip("a", 2.0, shape), "b": chip("b", 1.0, shape)}
    found = find(shape, 64, pool({"a": 1, "b": 1}, memory=40_000), profiles)
    (pipeline,) = found.best.plan.pipelines
    layers = {stage.group: stage.num_layers for stage in pipeline.stages}
    assert layers == {"a": 8, "b": 4}


def test_the_chip_with_more_memory_stands_first():
    """1F1B keeps most micro-batches on the first stage."""
    shape = model(8)
    profiles = {"a": chip("a", 1.0, shape), "b": chip("b", 1.0, shape)}
    cluster = pool({"a": 1, "b": 1}, memory={"a": 20_900, "b": 21_500})
    found = find(shape, 32, cluster, profiles)
    assert [stage.group for stage in found.best.plan.pipelines[0].stages] == ["b", "a"]


def refused(num_blocks, sizes, memory, limits=PLAIN):
    shape = model(num_blocks)
    profiles = {name: chip(name, 1.0, shape) for name in sizes}
    with pytest.raises(CapacityError, match="does not fit") as caught:
        find(shape, 8, pool(sizes, memory=memory), profiles, limits)
    assert caught.value.hint is not None
    return caught.value.message, caught.value.hint


def test_an_impossible_job_names_the_nearest_plan_and_what_it_lacks():
    message, hint = refused(8, {"a": 2}, 20_000)
    # Ten layers of 1,000 parameters at 4 bytes, 100 bytes of activations for each of two in flight.
    assert "5 of 10 layers on group 'a'" in message
    assert "needs 20.5 KiB on each device, 1000 B more than the 19.5 KiB" in message
    assert "19.5 KiB weights, gradients and optimizer, 1000 B activations" in message
    assert "full recomputation (19.9 KiB instead, not enough alone)" in hint
    with_all, hint = refused(8, {"a": 2}, 20_000, Limits(max_stages=1))
    assert "10 of 10 layers" in with_all
    assert "recomputation (" not in hint  # allowed already
    assert "deeper than 1 stage" in hint


def test_the_nearest_plan_leaves_no_more_to_the_smaller_chip_than_it_must():
    message, _ = refused(8, {"a": 1, "b": 1}, {"a": 24_000, "b": 6_000})
    assert "8 of 10 layers on group 'a'" in message or "2 of 10 layers on group 'b'" in message


def test_what_an_error_suggests_makes_the_job_fit():
    """The limit lies between what recomputation takes and what it leaves."""
    _, hint = refused(8, {"a": 2}, 20_400)
    assert "full recomputation (19.9 KiB instead, then it fits)" in hint
    shape = model(8)
    again = replace(PLAIN, recompute=("none", "full"))
    found = find(shape, 8, pool({"a": 2}, memory=20_400), {"a": chip("a", 1.0, shape)}, again)
    assert found.best.prediction.fits


@pytest.mark.parametrize("memory", [13_000, 18_000, 60_000])
def test_every_plan_that_is_returned_fits(memory):
    shape = model(12)
    profiles = {name: chip(name, speed, shape, tps=(1, 2)) for name, speed in (("a", 3), ("b", 1))}
    limits = Limits(num_simulated=4)
    found = find(shape, 16, pool({"a": 4, "b": 4}, memory=memory), profiles, limits)
    for candidate in (found.best, *found.runners_up):
        candidate.plan.check()
        assert candidate.plan.micro_batches == 16
        assert candidate.prediction.fits


def test_short_memory_brings_recomputation_or_a_shared_optimizer_not_a_failure():
    shape = model(8)
    profiles = {"a": chip("a", 1.0, shape)}
    cluster = pool({"a": 4}, memory=13_500)
    roomy = find(shape, 16, pool({"a": 4}), profiles, Limits())
    tight = find(shape, 16, cluster, profiles, Limits())
    plan = tight.best.plan
    uses = plan.shards_optimizer or any(
        s.recompute != "none" for p in plan.pipelines for s in p.stages
    )
    assert uses or len(plan.pipelines[0].stages) > len(roomy.best.plan.pipelines[0].stages)
    assert tight.best.prediction.fits


def test_the_same_search_gives_the_same_plan():
    shape = model(12)
    profiles = {name: chip(name, speed, shape, tps=(1, 2)) for name, speed in (("a", 3), ("b", 1))}
    plans = [
        find(shape, 16, pool({"a": 2, "b": 2}, memory=30_000), profiles, Limits()).best.plan
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_little_is_summed_over_slow_links_between_groups():
    """Copies of a pipeline over both groups hand over activations, others sum all gradients."""
    shape = model(12, params=100_000)
    profiles = {name: chip(name, speed, shape) for name, speed in (("a", 2), ("b", 1))}
    memory = 3_000_000
    slow = find(shape, 64, pool({"a": 4, "b": 4}, between=2e4, memory=memory), profiles)
    assert slow.best.prediction.reduce_s < 0.1 * slow.best.prediction.iteration_s


def test_only_allowed_schedules_and_depths_are_used():
    shape = model(12)
    profiles = {name: chip(name, speed, shape) for name, speed in (("a", 2), ("b", 1))}
    cluster = pool({"a": 2, "b": 2}, memory=30_000)
    for schedule in ("1f1b", "zero-bubble", "interleaved", "gpipe"):
        found = find(shape, 16, cluster, profiles, Limits(schedules=(schedule,), max_stages=2))
        for candidate in (found.best, *found.runners_up):
            assert candidate.plan.schedule == schedule
            assert max(len(pipeline.stages) for pipeline in candidate.plan.pipelines) <= 2


def test_a_hopelessly_slow_group_is_left_out():
    shape = model(6)
    profiles = {"a": chip("a", 10.0, shape), "b": chip("b", 0.01, shape)}
    found = find(shape, 8, pool({"a": 2, "b": 2}), profiles)
    used = {stage.group for p in found.best.plan.pipelines for stage in p.stages}
    assert used == {"a"}


def test_a_micro_batch_that_does_not_divide_the_rows_is_refused():
    shape = model(4)
    profiles = {"a": chip("a", 1.0, shape)}
    with pytest.raises(UserError, match="do not divide 7 rows"):
        find(shape, 7, pool({"a": 1}), profiles, Limits(micro_batches=(2,)))


def test_a_chip_without_profile_is_named():
    shape = model(4)
    with pytest.raises(UserError, match="chip 'b'"):
        find(shape, 8, pool({"a": 1, "b": 1}), {"a": chip("a", 1.0, shape)})


# -- Sailor's measured profiles ----------------------------------------------------------------


def sailor_profile(name: str) -> ChipProfile:
    data = json.loads((SAILOR / f"OPT-350__{name}.json").read_text())
    kinds = {"0": "embedding", "1": "block", "25": "head"}
    return ChipProfile(
        chip=name,
        costs={
            (kind, int(rows), int(tp)): LayerCost(
                forward_s=layers[number][0],
                backward_s=layers[number][1],
                optimizer_s=layers[number][2],
            )
            for rows, widths in data.items()
            for tp, layers in widths.items()
            for number, kind in kinds.items()
        },
        framework_bytes=sailor.FRAMEWORK_BYTES,
    )


def sailor_shape():
    profiles = {tuple(path.stem.split("__")): path.read_text() for path in SAILOR.glob("*__*.json")}
    found = sailor.cases(
        (SAILOR / "measured-plans.csv").read_text(),
        (SAILOR / "llm_info.json").read_text(),
        (SAILOR / "network_coeffs.json").read_text(),
        profiles,  # type: ignore[arg-type]
    )
    return next(case.shape for case in found if case.shape.name == "OPT-350")


def test_the_planner_follows_the_profile_and_not_the_age_of_a_chip():
    """RTX-3090 nodes lose by tensor parallelism: at width 8 an RTX-2080 is twice as fast."""
    shape = sailor_shape()
    profiles = {name: sailor_profile(name) for name in ("RTX-3090", "RTX-2080")}
    sizes = {"RTX-3090": 24 * 10**9, "RTX-2080": 11 * 10**9}
    cluster = pool({"RTX-3090": 8, "RTX-2080": 8}, memory=sizes, between=3e9, inside=1e10)
    memory = sailor.SAILOR_MEMORY
    wide = Limits(tps=(8,), micro_batches=(2,), num_simulated=2)
    found = search(shape, 64, cluster, profiles, memory=memory, limits=wide)
    work = {"RTX-3090": 0, "RTX-2080": 0}
    for pipeline in found.best.plan.pipelines:
        for stage in pipeline.stages:
            work[stage.group] += stage.num_layers * pipeline.micro_batches
    assert work["RTX-2080"] > 1.5 * work["RTX-3090"]
    any_width = Limits(tps=(4, 8), micro_batches=(2,), num_simulated=2)
    free = search(shape, 64, cluster, profiles, memory=memory, limits=any_width)
    widths = {s.tp for p in free.best.plan.pipelines for s in p.stages if s.group == "RTX-3090"}
    assert widths
    assert max(widths) < 8
    assert free.best.prediction.iteration_s < found.best.prediction.iteration_s


@pytest.mark.slow
def test_a_thousand_devices_of_six_chips_are_planned_in_seconds():
    speeds = {"a": 1.0, "b": 1.3, "c": 1.7, "d": 2.0, "e": 2.5, "f": 3.0}
    shape = model(80)
    profiles = {
        n: chip(n, v, shape, micro_batches=(1, 2), tps=(1, 2, 4, 8)) for n, v in speeds.items()
    }
    cluster = pool(
        {"a": 128, "b": 320, "c": 128, "d": 200, "e": 96, "f": 128}, memory=12_000, between=1e5
    )
    began = time.process_time()
    found = find(shape, 1024, cluster, profiles, Limits())
    assert time.process_time() - began < 30
    assert found.best.prediction.fits
    assert found.best.plan.num_devices > 900


def test_experts_are_shared_out_over_pipelines_where_one_cannot_hold_them():
    """A model whose experts are most of its weights, in devices that hold a quarter of it."""
    shape = model(4)
    moe = replace(
        shape.layers[1], kind="block.moe", params=40_000, active_params=4_000, routed_to=2
    )
    shape = replace(shape, layers=(shape.layers[0], *[moe] * 4, shape.layers[-1]))
    profiles = {"a": chip("a", 1.0, shape)}
    limits = Limits(schedules=("1f1b",), may_shard_optimizer=False)
    cluster = pool({"a": 8}, memory=230_000)
    found = find(shape, 32, cluster, profiles, limits)
    assert found.best.plan.expert_parallel > 1
    assert found.best.prediction.fits
    without = find(shape, 32, cluster, profiles, replace(limits, max_expert_parallel=1))
    assert without.best.plan.expert_parallel == 1
    assert found.best.prediction.iteration_s < without.best.prediction.iteration_s
