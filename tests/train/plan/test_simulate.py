"""Whole plans, simulated: against closed forms, sums by hand, and the predictor."""

import itertools
import time
from dataclasses import replace

import pytest

from mxn.errors import ConfigError
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.order_csv import from_csv
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.predict import Tuning, predict
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.schedules import order
from mxn.train.plan.shape import LayerShape, ModelShape
from mxn.train.plan.simulate import simulate_plan
from mxn.train.plan.timeline import text
from mxn.train.plan.timeline_svg import svg

_SEQ = 8


def _layer(kind):
    return LayerShape(
        kind=kind, params=1000, forward_flop=2000.0, activation_bytes=100.0, output_bytes=10.0
    )


def _shape(num_blocks, is_tied=False):
    layers = [_layer("embedding"), *[_layer("block")] * num_blocks, _layer("head")]
    return ModelShape(name="tiny", layers=tuple(layers), seq_tokens=_SEQ, is_tied=is_tied)


def _profile(chip, seconds):
    cost = LayerCost(forward_s=seconds, backward_s=2 * seconds, optimizer_s=0.01, weight_s=seconds)
    kinds = ("embedding", "block", "head")
    return ChipProfile(chip=chip, costs={(kind, 1, tp): cost for kind in kinds for tp in (1, 2, 8)})


PROFILES = {"fast": _profile("fast", 0.1), "slow": _profile("slow", 0.2)}
_FREE = Link(latency_s=0.0, bytes_per_s=1e15)


def _group(name, chip, num_devices=64, link=_FREE):
    return DeviceGroup(
        name=name,
        chip=chip,
        num_devices=num_devices,
        devices_per_node=8,
        memory_bytes=10**9,
        node_link=link,
        group_link=link,
        peak_flop_per_s=1e6,
        watts=100.0,
        price_micro_per_hour=3_600_000,
    )


def _cluster(between=_FREE, link=_FREE, num_devices=64):
    groups = (
        _group("a", "fast", num_devices, link),
        _group("b", "slow", num_devices, link),
    )
    return Cluster(groups=groups, links={("a", "b"): between})


def _pipeline(cuts, groups, batches, first_device=0, tp=1):
    """`cuts` are the ends of the parts; chunk by chunk when there are more parts than groups."""
    bounds = [0, *cuts]
    parts = [Chunk(first=a, end=b) for a, b in itertools.pairwise(bounds)]
    size = len(groups)
    stages = tuple(
        Stage(group=group, first_device=first_device + s * tp, chunks=tuple(parts[s::size]), tp=tp)
        for s, group in enumerate(groups)
    )
    return Pipeline(stages=stages, micro_batches=batches)


def _plan(*pipelines, schedule="1f1b", num_layers=8):
    return TrainPlan(
        model="tiny",
        num_layers=num_layers,
        seq_tokens=_SEQ,
        micro_batch=1,
        pipelines=pipelines,
        schedule=schedule,
    )


def test_an_even_pipeline_takes_its_closed_form():
    plan = _plan(_pipeline([4, 8], "aa", 6))
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES)
    rounds_s = 4 * 0.3
    assert done.prediction.pipeline_s == pytest.approx((6 + 1) * rounds_s)
    assert done.prediction.iteration_s == pytest.approx(7 * rounds_s + 4 * 0.01)
    assert done.prediction.bubble == pytest.approx(1 / 7)
    assert done.prediction.tokens_per_s == pytest.approx(6 * _SEQ / done.prediction.iteration_s)
    assert [row.busy_s for row in done.prediction.stages] == pytest.approx([6 * rounds_s] * 2)


def test_split_layers_balance_chips_of_two_speeds():
    # Twice as many layers for the chip that is twice as fast: as good as an even pipeline.
    plan = _plan(_pipeline([6, 9], "ab", 10), num_layers=9)
    done = simulate_plan(plan, _shape(7), _cluster(), PROFILES)
    assert done.prediction.pipeline_s == pytest.approx((10 + 1) * 6 * 0.3)


def test_chunks_have_their_own_layers_and_times():
    plan = _plan(_pipeline([1, 2, 5, 8], "aa", 4), schedule="interleaved")
    line = simulate_plan(plan, _shape(6), _cluster(), PROFILES).timeline(0)
    lengths = {
        (action.kind, action.chunk): end - start
        for action, start, end in zip(line.order[0], line.starts_s[0], line.ends_s[0], strict=True)
    }
    assert lengths["F", 0] == pytest.approx(0.1)
    assert lengths["F", 1] == pytest.approx(0.3)
    assert lengths["B", 1] == pytest.approx(0.6)


def test_a_slow_link_between_groups_is_paid_both_ways():
    slow = Link(latency_s=0.05, bytes_per_s=80 / 0.15)  # 80 bytes in 0.2 s
    plan = _plan(_pipeline([4, 8], "ab", 1))
    near = simulate_plan(plan, _shape(6), _cluster(), PROFILES).prediction
    far = simulate_plan(plan, _shape(6), _cluster(between=slow), PROFILES).prediction
    assert far.pipeline_s - near.pipeline_s == pytest.approx(2 * 0.2)
    assert [row.send_s for row in far.stages] == pytest.approx([0.2, 0.2])


def test_extra_warmup_hides_a_slow_link_and_takes_memory():
    slow = Link(latency_s=0.5, bytes_per_s=1e12)
    plan = _plan(_pipeline([4, 8], "aa", 12))
    cluster = _cluster(link=slow)
    plain = simulate_plan(plan, _shape(6), cluster, PROFILES).prediction
    ahead = simulate_plan(plan, _shape(6), cluster, PROFILES, extra_warmup=(1, 0)).prediction
    assert ahead.pipeline_s < plain.pipeline_s - 2.0
    kept = 4 * 100.0 * _SEQ  # of one micro-batch in four layers
    assert ahead.stages[0].memory_bytes - plain.stages[0].memory_bytes == pytest.approx(kept)


def test_the_faster_pipeline_waits_for_the_slower_before_the_gradient_sum():
    link = Link(latency_s=0.25, bytes_per_s=1e15)
    plan = _plan(_pipeline([8], "a", 4), _pipeline([8], "b", 3))
    done = simulate_plan(plan, _shape(6), _cluster(between=link), PROFILES)
    slow_s = 3 * 8 * 0.6
    assert done.prediction.pipeline_s == pytest.approx(slow_s)
    assert done.sums[0, 0] == done.sums[1, 0] == [pytest.approx((slow_s, slow_s + 0.5))]
    assert done.prediction.reduce_s == pytest.approx(0.5)
    assert done.kinds == (0, 1)


def test_late_stages_sum_their_gradients_while_early_ones_compute():
    link = Link(latency_s=0.05, bytes_per_s=1e15)
    plan = _plan(_pipeline([4, 8], "aa", 4), _pipeline([4, 8], "aa", 4, first_device=2))
    done = simulate_plan(plan, _shape(6), _cluster(link=link), PROFILES)
    line = done.timeline(0)
    assert done.sums[0, 1][0][0] == pytest.approx(line.ends_s[1][-1])
    assert done.sums[0, 1][-1][1] < line.makespan_s
    # Only the first stage's sum is left when the pipelines are done.
    assert done.prediction.reduce_s == pytest.approx(2 * 0.05)


def test_pipelines_that_are_alike_are_simulated_once():
    plan = _plan(*(_pipeline([4, 8], "aa", 4, first_device=2 * i) for i in range(8)))
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES)
    assert len(done.timelines) == 1
    assert done.kinds == (0,) * 8


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_closed_form_agrees_where_it_is_exact(schedule):
    plan = _plan(_pipeline([4, 8], "aa", 5), _pipeline([8], "b", 2), schedule=schedule)
    shape, cluster = _shape(6), _cluster()
    closed = predict(plan, shape, cluster, PROFILES)
    done = simulate_plan(plan, shape, cluster, PROFILES).prediction
    assert done.iteration_s == pytest.approx(closed.iteration_s)
    assert done.bubble == pytest.approx(closed.bubble)
    assert done.mfu == pytest.approx(closed.mfu)
    assert done.energy_j == pytest.approx(closed.energy_j)
    assert done.cost_micro == pytest.approx(closed.cost_micro)
    assert [row.memory_bytes for row in done.stages] == pytest.approx(
        [row.memory_bytes for row in closed.stages]
    )


def test_energy_and_cost_follow_the_simulated_time():
    plan = _plan(_pipeline([3, 8], "ab", 7), schedule="zero-bubble")
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES).prediction
    assert done.energy_j == pytest.approx(2 * 100.0 * done.iteration_s)
    assert done.cost_micro == pytest.approx(2 * 3_600_000 * done.iteration_s / 3600)


def test_zero_bubble_stores_on_the_last_stage_what_it_does_on_the_first():
    plan = _plan(_pipeline([2, 4, 6, 8], "aaaa", 9), schedule="zero-bubble")
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES, memory=MemoryModel(headroom=0.0))
    assert done.timeline(0).stored_peak == (4, 4, 4, 4)
    assert len({row.memory_bytes for row in done.prediction.stages}) == 1


def test_blocking_hops_hold_up_both_stages():
    slow = Link(latency_s=0.2, bytes_per_s=1e15)
    plan = _plan(_pipeline([4, 8], "aa", 4))
    done = simulate_plan(
        plan, _shape(6), _cluster(link=slow), PROFILES, tuning=Tuning(hops_block=True)
    )
    assert done.timeline(0).blocked_s == pytest.approx((4 * 0.4, 4 * 0.4))


def test_an_order_of_ones_own_is_simulated():
    plan = _plan(_pipeline([4, 8], "aa", 2))
    own = from_csv("0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n")
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES, orders={0: own})
    assert done.timeline(0).order == own
    with pytest.raises(ConfigError, match="stage 0 lacks F2"):
        simulate_plan(
            replace(plan, pipelines=(replace(plan.pipelines[0], micro_batches=3),)),
            _shape(6),
            _cluster(),
            PROFILES,
            orders={0: own},
        )


def test_a_tied_matrix_is_exchanged_between_first_and_last_stage():
    link = Link(latency_s=0.05, bytes_per_s=1e15)
    plan = _plan(_pipeline([4, 8], "aa", 4))
    loose = simulate_plan(plan, _shape(6), _cluster(link=link), PROFILES).prediction
    tied = simulate_plan(plan, _shape(6, is_tied=True), _cluster(link=link), PROFILES).prediction
    assert tied.reduce_s == pytest.approx(2 * 0.05)
    assert loose.reduce_s == 0


def test_a_simulation_can_be_drawn():
    plan = _plan(_pipeline([4, 8], "ab", 4), _pipeline([8], "a", 6, first_device=8))
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES)
    lanes = done.lanes()
    assert [lane.label for lane in lanes] == ["0.0 a", "0.1 b", "1.0 a"]
    assert lanes[0].detail == "layers 0-3"
    assert "</svg>" in svg(lanes, title="two pipelines")
    assert len(text(lanes).splitlines()) == 5


def test_ten_thousand_devices_take_seconds():
    """125 different pipelines of 10 stages of 8 devices; CPU time, so others do not count."""
    pipelines = []
    for number in range(125):
        cuts = [3 * s + (number + s) % 3 for s in range(1, 10)]
        pipelines.append(_pipeline([*cuts, 34], "a" * 5 + "b" * 5, 20 + number, number * 80, tp=8))
    plan = _plan(*pipelines, num_layers=34)
    began = time.process_time()
    done = simulate_plan(plan, _shape(32), _cluster(num_devices=10_000), PROFILES)
    assert time.process_time() - began < 10
    assert plan.num_devices == 10_000
    work_s = max((line.busy_s[stage]) for line in done.timelines for stage in range(10))
    assert done.prediction.pipeline_s >= work_s


def test_the_order_of_a_plan_is_the_one_that_the_executor_runs():
    plan = _plan(_pipeline([4, 8], "aa", 5), schedule="zero-bubble")
    done = simulate_plan(plan, _shape(6), _cluster(), PROFILES)
    assert done.timeline(0).order == order("zero-bubble", 2, 1, 5)
