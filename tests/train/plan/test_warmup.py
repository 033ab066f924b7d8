"""Extra warm-up is given where it shortens a step and fits, and nowhere else."""

from dataclasses import replace

import pytest

from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.simulate import simulate_plan
from mxn.train.plan.warmup import with_warmup
from support import tiny_plans

SLOW = Link(latency_s=0.6, bytes_per_s=1e12)
SHAPE = tiny_plans.shape(6)


def _mixed(schedule="1f1b"):
    """One pipeline over the slow link between two groups, one inside a group."""
    return tiny_plans.plan(
        tiny_plans.pipeline([4, 6, 8], "aab", 16),
        tiny_plans.pipeline([4, 8], "aa", 16, first_device=8),
        schedule=schedule,
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_only_the_pipeline_with_the_slow_link_is_ahead(schedule):
    plan, cluster = _mixed(schedule), tiny_plans.cluster(between=SLOW)
    plain = simulate_plan(plan, SHAPE, cluster, tiny_plans.PROFILES)
    made = with_warmup(plan, SHAPE, cluster, tiny_plans.PROFILES)
    far, near = made.plan.pipelines
    assert far.extra_warmup[0] > 0
    assert far.extra_warmup[-1] == 0
    assert near.extra_warmup == ()
    assert made.timeline(0).makespan_s < 0.95 * plain.timeline(0).makespan_s
    assert made.timeline(1).makespan_s == plain.timeline(1).makespan_s


def test_a_plan_that_wins_nothing_stays_as_it_is():
    plan, cluster = _mixed(), tiny_plans.cluster()
    assert with_warmup(plan, SHAPE, cluster, tiny_plans.PROFILES).plan == plan


def test_memory_is_a_hard_limit():
    plan, wide = _mixed(), tiny_plans.cluster(between=SLOW)
    plain = simulate_plan(plan, SHAPE, wide, tiny_plans.PROFILES).prediction
    enough = max(row.memory_bytes for row in plain.stages)
    groups = tuple(replace(group, memory_bytes=round(enough)) for group in wide.groups)
    tight = Cluster(groups=groups, links=wide.links)
    made = with_warmup(plan, SHAPE, tight, tiny_plans.PROFILES)
    assert made.prediction.fits
    assert made.plan.pipelines[0].extra_warmup == ()


def test_schedules_with_chunks_are_left_alone():
    plan = tiny_plans.plan(tiny_plans.pipeline([2, 4, 6, 8], "ab", 8), schedule="interleaved")
    cluster = tiny_plans.cluster(between=SLOW)
    assert with_warmup(plan, SHAPE, cluster, tiny_plans.PROFILES).plan == plan


def test_a_plan_keeps_its_warmup_through_json():
    plan = with_warmup(_mixed(), SHAPE, tiny_plans.cluster(between=SLOW), tiny_plans.PROFILES).plan
    assert plan.pipelines[0].extra_warmup
    assert TrainPlan.from_json(plan.to_json()) == plan


def test_warmup_for_other_stages_than_there_are_is_refused():
    plan = _mixed()
    pipeline = replace(plan.pipelines[0], extra_warmup=(1, 0))
    with pytest.raises(ValueError, match="3 stages and extra warm-up for 2"):
        replace(plan, pipelines=(pipeline,)).check()
