"""Micro-batches are shared out again by measured times: which, when, never to and fro."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import InternalError
from mxn.train.plan.search.shares import Pace, finish_s
from mxn.train.run import counts_log
from mxn.train.run.job import RebalanceSettings, metrics_path
from mxn.train.run.rebalance import (
    Change,
    Load,
    Rebalancer,
    counts_of,
    ranges_of,
    same_cut,
    share_out,
    with_counts,
)
from mxn.train.run.shares import Shares
from support import tiny_plans
from support.launches import group, small_job

paces = st.builds(
    Pace, st.floats(0, 10, allow_subnormal=False), st.floats(1e-3, 10, allow_subnormal=False)
)


def plan(*counts, schedule="1f1b", depth=1):
    groups = ["a"] * depth
    cuts = [*range(1, depth), 8]
    pipelines = (
        tiny_plans.pipeline(cuts, groups, count, first_device=depth * number)
        for number, count in enumerate(counts)
    )
    return tiny_plans.plan(*pipelines, schedule=schedule)


def run(rebalancer, paces, steps, noise=0.0, seed=0, first=0):
    """Do steps of pipelines with these paces; return the changes that were made."""
    draw, changes = random.Random(seed), []
    for step in range(first, first + steps):
        loads = []
        for pace, count in zip(paces, rebalancer.counts, strict=True):
            each = count * pace.each_s * (1 + draw.uniform(-noise, noise))
            loads.append(Load(total_s=pace.start_s + each, busy_s=each))
        change = rebalancer.observe(step, loads, 0.1 + max(load.total_s for load in loads))
        changes += [change] if change else []
    return changes


def rebalancer(plan, **options):
    return Rebalancer(plan, **{"every_steps": 5, "least_gain": 0.01} | options)


# -- which counts ------------------------------------------------------------------------------


@given(st.data())
def test_no_other_counts_end_earlier(data):
    rows = data.draw(st.lists(paces, min_size=1, max_size=4))
    before = data.draw(st.lists(st.integers(1, 12), min_size=len(rows), max_size=len(rows)))
    total = sum(before)
    found = share_out(rows, total, [(1, total)] * len(rows))
    assert sum(found) == total
    assert min(found) >= 1
    assert finish_s(rows, found) <= finish_s(rows, before) * (1 + 1e-12)


@given(st.data())
def test_ranges_are_kept(data):
    rows = data.draw(st.lists(paces, min_size=2, max_size=4))
    spans = [(low, low + data.draw(st.integers(0, 6))) for low in (1, 2, 3, 4)][: len(rows)]
    total = data.draw(st.integers(sum(a for a, _ in spans), sum(b for _, b in spans)))
    found = share_out(rows, total, spans)
    assert sum(found) == total
    assert all(low <= count <= high for count, (low, high) in zip(found, spans, strict=True))


def test_ranges_that_hold_too_few_are_an_error():
    with pytest.raises(InternalError, match="make 9 micro-batches"):
        share_out([Pace(0, 1)] * 2, 9, [(1, 4), (1, 4)])


def test_counts_of_another_plan_are_refused():
    assert counts_of(with_counts(plan(3, 5), (6, 2))) == (6, 2)
    for counts in ((3, 6), (8, 0), (2, 3, 3)):
        with pytest.raises(InternalError, match="none of a plan with"):
            with_counts(plan(3, 5), counts)


@pytest.mark.parametrize(
    ("schedule", "depth", "ranges"),
    [
        ("1f1b", 1, [(1, 11), (1, 11)]),
        ("1f1b", 3, [(1, 2), (1, 11)]),  # a third one would be kept beside the two
        ("zero-bubble", 3, [(1, 2), (1, 11)]),
        ("gpipe", 1, [(1, 2), (1, 10)]),
    ],
)
def test_no_stage_keeps_more_than_was_planned(schedule, depth, ranges):
    assert ranges_of(plan(2, 10, schedule=schedule, depth=depth)) == ranges


def test_plans_of_one_cut_differ_in_counts_only():
    assert same_cut(plan(6, 6), plan(8, 4))
    assert not same_cut(plan(6, 6), plan(6, 6, depth=2))
    assert not same_cut(plan(6, 6), plan(6, 6, schedule="gpipe"))
    assert not same_cut(plan(6, 6), plan(4, 4, 4))
    on_b = replace(plan(6, 6).pipelines[1], stages=tiny_plans.pipeline([8], ["b"], 6).stages)
    assert not same_cut(plan(6, 6), replace(plan(6, 6), pipelines=(plan(6).pipelines[0], on_b)))


# -- when --------------------------------------------------------------------------------------


def test_a_wrong_profile_is_corrected_by_the_first_decision():
    """Planned as 1:1, the chips are 1:0.5."""
    job = rebalancer(plan(6, 6))
    (change,) = run(job, [Pace(0, 1.0), Pace(0, 2.0)], 40)
    assert (change.step, change.before, change.after) == (7, (6, 6), (8, 4))
    assert change.each_s == pytest.approx((1.0, 2.0))
    assert change.step_s == pytest.approx(12.1)
    assert change.predicted_s == pytest.approx(8.1)
    assert change.text() == (
        "micro-batches 6:6 -> 8:4 from step 8 on: measured 1 s, 2 s for each, "
        "step 12.1 s -> 8.1 s predicted"
    )


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.2, 5), min_size=2, max_size=4),
    st.lists(st.integers(1, 40), min_size=4, max_size=4),
    st.integers(0, 1000),
    st.sampled_from((0.005, 0.01)),
)
def test_one_per_cent_of_noise_moves_nothing_to_and_fro(each, counts, seed, least_gain):
    rows = [Pace(0, one) for one in each]
    job = rebalancer(plan(*counts[: len(rows)]), least_gain=least_gain)
    changes = run(job, rows, 150, noise=0.01, seed=seed)
    assert len(changes) <= 8  # in 28 decisions
    best = share_out(rows, sum(job.counts), [(1, 999)] * len(rows))
    assert finish_s(rows, job.counts) <= 1.035 * finish_s(rows, best)
    seen = [change.after for change in changes]
    assert len(set(seen)) >= len(seen) - 2  # none is taken again and again


def test_a_gain_below_the_least_is_not_worth_a_change():
    rows = [Pace(0, 1.0), Pace(0, 1.02)]
    assert run(rebalancer(plan(51, 49)), rows, 30) == []
    assert run(rebalancer(plan(51, 49), least_gain=0.0), rows, 30) == []  # it is the best
    assert run(rebalancer(plan(50, 50), least_gain=0.02), rows, 30) == []


def test_counts_that_were_measured_slower_are_left_and_not_tried_again():
    """The model takes no account of what makes the second pipeline slow with more than four."""
    job, tried = rebalancer(plan(8, 4)), []
    for step in range(60):
        slow = 30.0 if job.counts[1] > 4 else 4.0 * job.counts[1] / 4
        loads = [Load(total_s=float(job.counts[0]), busy_s=float(job.counts[0]))]
        loads.append(Load(total_s=slow, busy_s=job.counts[1]))
        change = job.observe(step, loads, 10.0)
        tried += [change.after] if change else []
    assert tried == [(6, 6), (8, 4)]


def test_a_chip_that_becomes_slower_is_followed():
    job = rebalancer(plan(6, 6))
    assert run(job, [Pace(0, 1.0), Pace(0, 1.0)], 30) == []
    (there,) = run(job, [Pace(0, 1.0), Pace(0, 2.0)], 20, first=30)
    assert there.after == (8, 4)
    (back,) = run(job, [Pace(0, 1.0), Pace(0, 1.0)], 20, first=50)
    assert back.after == (6, 6)


def test_filling_and_draining_are_no_work_of_a_micro_batch():
    job = rebalancer(plan(6, 6))
    (change,) = run(job, [Pace(6.0, 1.0), Pace(0, 1.0)], 20)
    assert change.after == (3, 9)


# -- again behind a restart --------------------------------------------------------------------


def change(step, before, after):
    return Change(
        step=step, before=before, after=after, each_s=(1.0, 2.0), step_s=12.0, predicted_s=8.0
    )


def test_steps_that_are_done_again_have_the_counts_they_had(tmp_path):
    planned = plan(6, 6)
    decided = [change(7, (6, 6), (8, 4)), change(22, (8, 4), (9, 3))]
    for one in decided:
        counts_log.append(tmp_path, planned.fingerprint, one)
    counts_log.append(tmp_path, "another plan", change(9, (6, 6), (1, 11)))
    assert counts_log.read(tmp_path, planned.fingerprint) == decided
    assert len(counts_log.read_all(tmp_path)) == 3
    for first, counts in ((0, (6, 6)), (6, (6, 6)), (7, (8, 4)), (21, (8, 4)), (22, (9, 3))):
        known = counts_log.since(counts_log.read(tmp_path, planned.fingerprint), first)
        job = rebalancer(planned, first_step=first, recorded=known)
        assert job.counts == counts
        for step in range(first, 22):
            expected = [one.after for one in decided if one.step <= step]
            assert job.counts == (expected or [(6, 6)])[-1]
            assert run(job, [Pace(0, 1.0)] * 2, 1, first=step) == []  # whatever is measured
        assert job.counts == (9, 3)
    counts_log.forget(tmp_path)
    assert counts_log.read_all(tmp_path) == []


def test_steps_in_which_nothing_changed_are_done_again_without_a_change():
    """The second run has other measurements: its first decision waits for the first new step."""
    rows = [Pace(0, 1.0), Pace(0, 2.0)]
    job = rebalancer(plan(6, 6), first_step=100, num_done=180)
    (found,) = run(job, rows, 100, first=100)
    assert (found.step, found.after) == (180, (8, 4))
    job = rebalancer(plan(6, 6), first_step=178, num_done=180)  # too few of them to decide by
    (found,) = run(job, rows, 100, first=178)
    assert found.step == 178 + 2 + 5


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_no_step_is_done_again_with_other_counts_however_often_a_run_is_killed(kills, seed):
    """Each kill: steps until then, and how far back the checkpoint is. Chips change their speed."""
    draw, planned, first, reached, counts = random.Random(seed), plan(8, 8), 0, 0, {}
    with TemporaryDirectory() as folder:
        for steps, back in [*kills, (30, 0)]:
            num_done = counts_log.begin(Path(folder), planned.fingerprint, reached)
            assert num_done == len(counts)  # also of steps that are not reached again
            known = counts_log.since(counts_log.read(Path(folder), planned.fingerprint), first)
            job = rebalancer(planned, first_step=first, recorded=known, num_done=num_done)
            rows = [Pace(0, draw.uniform(0.5, 2)) for _ in range(2)]
            for step in range(first, first + steps):
                assert counts.setdefault(step, job.counts) == job.counts
                for one in run(job, rows, 1, noise=0.01, seed=step, first=step):
                    counts_log.append(Path(folder), planned.fingerprint, one)
            reached = first + steps
            first = max(0, reached - back)


def test_steps_of_another_plan_hold_nothing_up(tmp_path):
    assert counts_log.begin(tmp_path, "first", 0) == 0
    assert counts_log.begin(tmp_path, "second", 180) == 0
    assert counts_log.begin(tmp_path, "second", 150) == 150
    assert counts_log.begin(tmp_path, "first", 120) == 180
    assert counts_log.begin(tmp_path, "second", 110) == 150
    counts_log.forget(tmp_path)
    assert counts_log.begin(tmp_path, "second", 150) == 0


def test_the_first_rank_tells_all_what_was_done(tmp_path):
    planned = plan(6, 6)
    job = small_job(tmp_path, 300, [group("a", count=2)], rebalance=RebalanceSettings())
    counts_log.begin(Path(job.out), planned.fingerprint, 0)
    rows = "".join(f'{{"step": {step}}}\n' for step in range(180))
    metrics_path(job).write_text(rows)
    told = []

    def shares(rank):
        bridge = SimpleNamespace(rank=rank, gather=lambda mine: (told.append(mine), told[:1])[1])
        trainer = SimpleNamespace(
            placement=SimpleNamespace(plan=planned), bridge=bridge, step=100, counts=(6, 6)
        )
        return Shares(job, trainer, keeper=None)._rebalancer

    for rank in range(2):
        (found,) = run(shares(rank), [Pace(0, 1.0), Pace(0, 2.0)], 100, first=100)
        assert found.step == 180


def test_decisions_go_on_behind_the_last_recorded_one():
    job = rebalancer(plan(6, 6), recorded=[(3, (9, 3))])
    (found,) = run(job, [Pace(0, 1.0), Pace(0, 2.0)], 20)
    assert (found.step, found.before, found.after) == (3 + 1 + 5, (9, 3), (8, 4))


def test_a_plan_of_one_pipeline_has_nothing_to_share():
    assert run(rebalancer(plan(6)), [Pace(0, 1.0)], 30) == []
