"""The closed forms against exact results and against the event simulator."""

import random

import pytest

from mxn.train.plan.closed import pipeline_time
from mxn.train.plan.costs import StageCost
from mxn.train.plan.events import Hop, PipelineTimes, simulate
from mxn.train.plan.schedules import order


def cost(forward_s, backward_s=None, weight_s=None):
    backward_s = 2 * forward_s if backward_s is None else backward_s
    return StageCost(
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=backward_s / 2 if weight_s is None else weight_s,
        optimizer_s=0.0,
        params=0.0,
        kept_bytes=0.0,
        working_bytes=0.0,
    )


def simulated(stages, hops, count, schedule="1f1b"):
    times = PipelineTimes(
        forward_s=tuple((stage.forward_s,) for stage in stages),
        backward_s=tuple((stage.backward_s,) for stage in stages),
        weight_s=tuple((stage.weight_s,) for stage in stages),
        forward_hops=tuple(Hop(there) for there, _ in hops),
        backward_hops=tuple(Hop(back) for _, back in hops),
    )
    return simulate(order(schedule, len(stages), 1, count), times)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 7), (2, 5), (4, 8), (5, 3), (8, 64)])
def test_equal_stages_have_the_textbook_bubble(schedule, size, count):
    total = pipeline_time([cost(1.0)] * size, [(0, 0)] * (size - 1), count, schedule).total_s
    assert total == pytest.approx(3.0 * (count + size - 1))


def test_zero_bubble_h1_waits_for_forward_and_the_input_half_less_the_weight_half():
    total = pipeline_time([cost(1.0)] * 4, [(0, 0)] * 3, 16, "zero-bubble").total_s
    assert total == pytest.approx(3.0 * 16 + 3 * 1.0)


def test_interleaving_divides_the_bubble():
    total = pipeline_time([cost(1.0)] * 4, [(0, 0)] * 3, 16, "interleaved", chunks=2).total_s
    assert total == pytest.approx(3.0 * 16 + 3 * 3.0 / 2)


def random_pipeline(rnd):
    size, count = rnd.randint(1, 8), rnd.choice([1, 2, 4, 8, 16, 32, 64])
    stages = [cost(rnd.uniform(0.5, 1.5)) for _ in range(size)]
    width = rnd.choice([0.0, 0.1, 0.5, 2.0])
    hops = [(h, h) for h in (width * rnd.random() for _ in range(size - 1))]
    return stages, hops, count


def test_uneven_1f1b_is_within_a_few_percent_of_the_simulator():
    rnd = random.Random(7)
    errors = []
    for _ in range(200):
        stages, hops, count = random_pipeline(rnd)
        exact = simulated(stages, hops, count).makespan_s
        error = pipeline_time(stages, hops, count, "1f1b").total_s / exact - 1
        assert -0.05 < error < 0.25  # the worst are short steps of very uneven stages
        errors.append(abs(error))
    assert sum(errors) / len(errors) < 0.015


def test_long_steps_are_closer():
    rnd = random.Random(8)
    for _ in range(60):
        stages, hops, _ = random_pipeline(rnd)
        exact = simulated(stages, hops, 64).makespan_s
        assert pipeline_time(stages, hops, 64, "1f1b").total_s == pytest.approx(exact, rel=0.05)


def test_later_stages_end_earlier():
    time = pipeline_time([cost(1.0)] * 3, [(0.1, 0.1)] * 2, 4, "1f1b")
    assert time.stage_ends_s[0] == time.total_s
    assert time.stage_ends_s == pytest.approx([time.total_s - 2.1 * s for s in range(3)])


def test_a_transfer_that_blocks_is_never_cheaper():
    stages, hops = [cost(1.0)] * 3, [(0.2, 0.2)] * 2
    free = pipeline_time(stages, hops, 16, "1f1b").total_s
    blocking = pipeline_time(stages, hops, 16, "1f1b", blocks=True).total_s
    assert blocking > free
    # The middle stage takes part in four transfers of each micro-batch.
    assert blocking == pytest.approx(15 * (3 + 0.8) + 9 + 0.8, rel=0.01)


def test_sending_late_costs_a_round_trip_for_each_micro_batch():
    stages, hops = [cost(1.0)] * 2, [(1.0, 1.0)]
    late = pipeline_time(stages, hops, 32, "1f1b", late_sends=True).total_s
    assert late == pytest.approx(31 * (3 + 2) + 6 + 2, rel=0.03)
    assert pipeline_time(stages, hops, 32, "1f1b").total_s < late
