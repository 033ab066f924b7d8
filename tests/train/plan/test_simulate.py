"""Whole plans, simulated: against closed forms, sums by hand, and the predictor."""

import time
from dataclasses import replace

import pytest

from mxn.errors import ConfigError
from mxn.train.plan.cluster import Link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.order_csv import from_csv
from mxn.train.plan.predict import Tuning, predict
from mxn.train.plan.schedules import order
from mxn.train.plan.simulate import simulate_plan
from support import tiny_plans


def test_an_even_pipeline_takes_its_closed_form():
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "aa", 6))
    done = simulate_plan(plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES)
    rounds_s = 4 * 0.3
    assert done.prediction.pipeline_s == pytest.approx((6 + 1) * rounds_s)
    assert done.prediction.iteration_s == pytest.approx(7 * rounds_s + 4 * 0.01)
    assert done.prediction.bubble == pytest.approx(1 / 7)
    assert done.prediction.tokens_per_s == pytest.approx(
        6 * tiny_plans.SEQ_TOKENS / done.prediction.iteration_s
    )
    assert [row.busy_s for row in done.prediction.stages] == pytest.approx([6 * rounds_s] * 2)


def test_split_layers_balance_chips_of_two_speeds():
    # Twice as many layers for the chip that is twice as fast: as good as an even pipeline.
    plan = tiny_plans.plan(tiny_plans.pipeline([6, 9], "ab", 10), num_layers=9)
    done = simulate_plan(plan, tiny_plans.shape(7), tiny_plans.cluster(), tiny_plans.PROFILES)
    assert done.prediction.pipeline_s == pytest.approx((10 + 1) * 6 * 0.3)


def test_chunks_have_their_own_layers_and_times():
    plan = tiny_plans.plan(tiny_plans.pipeline([1, 2, 5, 8], "aa", 4), schedule="interleaved")
    line = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES
    ).timeline(0)
    lengths = {
        (action.kind, action.chunk): end - start
        for action, start, end in zip(line.order[0], line.starts_s[0], line.ends_s[0], strict=True)
    }
    assert lengths["F", 0] == pytest.approx(0.1)
    assert lengths["F", 1] == pytest.approx(0.3)
    assert lengths["B", 1] == pytest.approx(0.6)


def test_a_slow_link_between_groups_is_paid_both_ways():
    slow = Link(latency_s=0.05, bytes_per_s=80 / 0.15)  # 80 bytes in 0.2 s
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "ab", 1))
    near = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES
    ).prediction
    far = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(between=slow), tiny_plans.PROFILES
    ).prediction
    assert far.pipeline_s - near.pipeline_s == pytest.approx(2 * 0.2)
    assert [row.send_s for row in far.stages] == pytest.approx([0.2, 0.2])


def test_extra_warmup_hides_a_slow_link_and_takes_memory():
    slow = Link(latency_s=0.5, bytes_per_s=1e12)
    pipeline = tiny_plans.pipeline([4, 8], "aa", 12)
    shape, cluster = tiny_plans.shape(6), tiny_plans.cluster(link=slow)
    plan = tiny_plans.plan(pipeline)
    early = tiny_plans.plan(replace(pipeline, extra_warmup=(1, 0)))
    plain = simulate_plan(plan, shape, cluster, tiny_plans.PROFILES).prediction
    ahead = simulate_plan(early, shape, cluster, tiny_plans.PROFILES).prediction
    assert ahead.pipeline_s < plain.pipeline_s - 2.0
    kept = 4 * 100.0 * tiny_plans.SEQ_TOKENS  # of one micro-batch in four layers
    assert ahead.stages[0].memory_bytes - plain.stages[0].memory_bytes == pytest.approx(kept)
    closed = predict(early, shape, cluster, tiny_plans.PROFILES)
    assert closed.stages[0].memory_bytes == pytest.approx(ahead.stages[0].memory_bytes)


def test_the_faster_pipeline_waits_for_the_slower_before_the_gradient_sum():
    link = Link(latency_s=0.25, bytes_per_s=1e15)
    plan = tiny_plans.plan(tiny_plans.pipeline([8], "a", 4), tiny_plans.pipeline([8], "b", 3))
    done = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(between=link), tiny_plans.PROFILES
    )
    slow_s = 3 * 8 * 0.6
    assert done.prediction.pipeline_s == pytest.approx(slow_s)
    assert done.sums[0, 0] == done.sums[1, 0] == [pytest.approx((slow_s, slow_s + 0.5))]
    assert done.prediction.reduce_s == pytest.approx(0.5)
    assert done.kinds == (0, 1)


def test_late_stages_sum_their_gradients_while_early_ones_compute():
    link = Link(latency_s=0.05, bytes_per_s=1e15)
    plan = tiny_plans.plan(
        tiny_plans.pipeline([4, 8], "aa", 4), tiny_plans.pipeline([4, 8], "aa", 4, first_device=2)
    )
    done = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(link=link), tiny_plans.PROFILES
    )
    line = done.timeline(0)
    assert done.sums[0, 1][0][0] == pytest.approx(line.ends_s[1][-1])
    assert done.sums[0, 1][-1][1] < line.makespan_s
    # Only the first stage's sum is left when the pipelines are done.
    assert done.prediction.reduce_s == pytest.approx(2 * 0.05)


def test_pipelines_that_are_alike_are_simulated_once():
    plan = tiny_plans.plan(
        *(tiny_plans.pipeline([4, 8], "aa", 4, first_device=2 * i) for i in range(8))
    )
    done = simulate_plan(plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES)
    assert len(done.timelines) == 1
    assert done.kinds == (0,) * 8


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_closed_form_agrees_where_it_is_exact(schedule):
    plan = tiny_plans.plan(
        tiny_plans.pipeline([4, 8], "aa", 5), tiny_plans.pipeline([8], "b", 2), schedule=schedule
    )
    shape, cluster = tiny_plans.shape(6), tiny_plans.cluster()
    closed = predict(plan, shape, cluster, tiny_plans.PROFILES)
    done = simulate_plan(plan, shape, cluster, tiny_plans.PROFILES).prediction
    assert done.iteration_s == pytest.approx(closed.iteration_s)
    assert done.bubble == pytest.approx(closed.bubble)
    assert done.mfu == pytest.approx(closed.mfu)
    assert done.energy_j == pytest.approx(closed.energy_j)
    assert done.cost_micro == pytest.approx(closed.cost_micro)
    assert [row.memory_bytes for row in done.stages] == pytest.approx(
        [row.memory_bytes for row in closed.stages]
    )


def test_energy_and_cost_follow_the_simulated_time():
    plan = tiny_plans.plan(tiny_plans.pipeline([3, 8], "ab", 7), schedule="zero-bubble")
    done = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES
    ).prediction
    assert done.energy_j == pytest.approx(2 * 100.0 * done.iteration_s)
    assert done.cost_micro == pytest.approx(2 * 3_600_000 * done.iteration_s / 3600)


def test_zero_bubble_stores_on_the_last_stage_what_it_does_on_the_first():
    plan = tiny_plans.plan(tiny_plans.pipeline([2, 4, 6, 8], "aaaa", 9), schedule="zero-bubble")
    done = simulate_plan(
        plan,
        tiny_plans.shape(6),
        tiny_plans.cluster(),
        tiny_plans.PROFILES,
        memory=MemoryModel(headroom=0.0),
    )
    assert done.timeline(0).stored_peak == (4, 4, 4, 4)
    assert len({row.memory_bytes for row in done.prediction.stages}) == 1


def test_blocking_hops_hold_up_both_stages():
    slow = Link(latency_s=0.2, bytes_per_s=1e15)
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "aa", 4))
    done = simulate_plan(
        plan,
        tiny_plans.shape(6),
        tiny_plans.cluster(link=slow),
        tiny_plans.PROFILES,
        tuning=Tuning(hops_block=True),
    )
    assert done.timeline(0).blocked_s == pytest.approx((4 * 0.4, 4 * 0.4))


def test_an_order_of_ones_own_is_simulated():
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "aa", 2))
    own = from_csv("0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n")
    done = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES, orders={0: own}
    )
    assert done.timeline(0).order == own
    with pytest.raises(ConfigError, match="stage 0 lacks F2"):
        simulate_plan(
            replace(plan, pipelines=(replace(plan.pipelines[0], micro_batches=3),)),
            tiny_plans.shape(6),
            tiny_plans.cluster(),
            tiny_plans.PROFILES,
            orders={0: own},
        )


def test_a_tied_matrix_is_exchanged_between_first_and_last_stage():
    link = Link(latency_s=0.05, bytes_per_s=1e15)
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "aa", 4))
    loose = simulate_plan(
        plan, tiny_plans.shape(6), tiny_plans.cluster(link=link), tiny_plans.PROFILES
    ).prediction
    tied = simulate_plan(
        plan, tiny_plans.shape(6, is_tied=True), tiny_plans.cluster(link=link), tiny_plans.PROFILES
    ).prediction
    assert tied.reduce_s == pytest.approx(2 * 0.05)
    assert loose.reduce_s == 0


def test_ten_thousand_devices_take_seconds():
    """125 different pipelines of 10 stages of 8 devices; CPU time, so others do not count."""
    pipelines = []
    for number in range(125):
        cuts = [3 * s + (number + s) % 3 for s in range(1, 10)]
        pipelines.append(
            tiny_plans.pipeline([*cuts, 34], "a" * 5 + "b" * 5, 20 + number, number * 80, tp=8)
        )
    plan = tiny_plans.plan(*pipelines, num_layers=34)
    began = time.process_time()
    done = simulate_plan(
        plan, tiny_plans.shape(32), tiny_plans.cluster(num_devices=10_000), tiny_plans.PROFILES
    )
    assert time.process_time() - began < 10
    assert plan.num_devices == 10_000
    work_s = max((line.busy_s[stage]) for line in done.timelines for stage in range(10))
    assert done.prediction.pipeline_s >= work_s


def test_the_order_of_a_plan_is_the_one_that_the_executor_runs():
    plan = tiny_plans.plan(tiny_plans.pipeline([4, 8], "aa", 5), schedule="zero-bubble")
    done = simulate_plan(plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES)
    assert done.timeline(0).order == order("zero-bubble", 2, 1, 5)
