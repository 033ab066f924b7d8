"""Real rank processes: they train, save, end well, and die in every way that is seen at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mxn.chips.sim.testing import skip_reason
from mxn.errors import UserError
from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.run import cpu_share
from mxn.train.run.bridge import Bridge
from mxn.train.run.control import Control
from mxn.train.run.job import FaultSettings, Job, metrics_path
from mxn.train.run.launch import LocalRanks, device_of, launch, launching_of
from mxn.train.run.owner import Owner
from mxn.train.run.placement import Placement
from mxn.train.run.rank import _connect
from mxn.train.run.track import read_metrics
from support.forked_start import quickly
from support.launches import group, on_one_device, small_job
from support.parity_cases import plan_of

needs_sim = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))
ALONE = plan_of((8, [[(0, 6)]]))
TWO_STAGES = plan_of((8, [[(0, 3)], [(3, 6)]]))
DEADLINE_S = 150


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start in a moment. The first test, and the one of a death, start them as users do."""
    quickly(monkeypatch)


def losses(job: Job) -> list[float]:
    return [line["loss"] for line in read_metrics(metrics_path(job))]


def to_end(job: Job, plan: TrainPlan, **more: int) -> LocalRanks:
    ranks = launch(launching_of(job, plan, **more))
    try:
        ranks.wait(DEADLINE_S)
    finally:
        ranks.kill()
    return ranks


def wait_for_step(job: Job, step: int, ranks: LocalRanks) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(losses(job)) <= step:
        assert not ranks.deaths(), ranks.tail(ranks.deaths()[0].rank)
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.02)


def stored(job: Job) -> list[int]:
    """Return the steps that whole checkpoints are of."""
    return [int(folder.name[-8:]) for folder in Path(job.checkpoint.folder).glob("step-????????")]


@pytest.mark.parametrize(("stall_s", "waits_s"), [(600.0, 600.0), (0.5, 60.0)])
def test_ranks_wait_for_each_other_as_long_as_for_a_step(tmp_path, monkeypatch, stall_s, waits_s):
    """Their quotas hold from the first import on: with a small one that takes minutes."""
    asked = []
    monkeypatch.setattr(Bridge, "connect", lambda *_, options, **__: asked.append(options))
    job = small_job(tmp_path, 3, [group()], faults=FaultSettings(stall_s=stall_s))
    spec, placement = SimpleNamespace(group="all", store="", rank=0, island=None), Placement(ALONE)
    _connect(job, spec, placement, device=None)
    assert (asked[0].connect_timeout_s, asked[0].timeout_s) == (waits_s, stall_s)


@needs_sim
def test_ranks_of_two_makers_train_to_the_end_and_stop_and_resume_to_the_same_bits(
    tmp_path, monkeypatch
):
    groups = [group("a"), group("b", "sim:0")]
    near, far = TWO_STAGES.pipelines[0].stages
    stages = replace(near, group="a"), replace(far, group="b", first_device=0)
    plan = replace(TWO_STAGES, pipelines=(Pipeline(stages=stages, micro_batches=8),))
    whole = small_job(tmp_path / "whole", 7, groups)
    to_end(whole, plan)
    assert Control(Path(whole.out), 0).is_finished()
    assert losses(whole) == pytest.approx(on_one_device(whole), rel=2e-5)
    line = read_metrics(metrics_path(whole))[-1]
    assert line["num_tokens"] == 8 * 24
    assert {"tokens_per_s", "rank0_busy_s", "rank1_waited_s"} <= line.keys()
    assert line["replica_drift"] < 1e-6  # of the tied matrix, which both makers hold

    quickly(monkeypatch)
    cut = small_job(tmp_path / "cut", 7, groups)
    ranks = launch(launching_of(cut, plan))
    try:
        wait_for_step(cut, 3, ranks)
        Control(Path(cut.out), 0).ask_pause()
        ranks.wait(DEADLINE_S)
    finally:
        ranks.kill()
    folders = sorted(Path(cut.checkpoint.folder).glob("step-*"))
    done = int(folders[-1].name.removeprefix("step-"))
    if done < 7:  # else it was faster than the word to stop
        assert not Control(Path(cut.out), 0).is_finished()
        to_end(cut, plan, launch=1, resume_step=done)
    assert losses(cut) == losses(whole)


def test_a_divided_optimizer_is_saved_and_restored(tmp_path, forked):
    plan = replace(plan_of((5, [[(0, 2)], [(2, 6)]]), (3, [[(0, 6)]])), shards_optimizer=True)
    whole, cut = (small_job(tmp_path / name, 6, [group(count=3)]) for name in ("whole", "cut"))
    to_end(whole, plan)
    ranks = launch(launching_of(cut, plan))
    try:
        wait_for_step(cut, 3, ranks)
        while not stored(cut):  # written beside the steps
            assert not ranks.deaths(), ranks.tail(ranks.deaths()[0].rank)
            time.sleep(0.02)
    finally:
        ranks.kill()
    done = max(stored(cut))
    assert done in (3, 6)
    one = plan_of((8, [[(0, 6)]]))  # under another plan: what was saved does not depend on it
    to_end(cut, one, launch=1, resume_step=done)
    assert losses(cut)[:done] == losses(whole)[:done]
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-5)
    assert losses(whole) == pytest.approx(on_one_device(whole), rel=2e-5)


def test_the_death_of_a_rank_is_seen_at_once_and_the_others_name_it(tmp_path):
    job = small_job(tmp_path, 10_000, [group(count=2)])
    ranks = launch(launching_of(job, TWO_STAGES))
    try:
        wait_for_step(job, 1, ranks)
        os.kill(ranks.pids()[1], signal.SIGKILL)
        begin = time.monotonic()
        while not ranks.deaths():
            time.sleep(0.01)
        assert time.monotonic() - begin < 2
        assert ranks.deaths()[0].rank == 1
        assert ranks.deaths()[0].code == -signal.SIGKILL
        while len(ranks.deaths()) < 2:
            assert time.monotonic() - begin < 30
            time.sleep(0.01)
        words = Control(tmp_path, 0).words_of(0)
        assert words is not None
        assert words.kind == "peer"
        assert "rank" in words.message
        assert "PeerError" in ranks.tail(0)
    finally:
        ranks.kill()
    assert ranks.have_ended()


def test_an_interrupt_ends_all_ranks(tmp_path, forked):
    job = small_job(tmp_path, 10_000, [group(count=2)])
    ranks = launch(launching_of(job, TWO_STAGES))
    try:
        wait_for_step(job, 0, ranks)
        ranks.interrupt()
        begin = time.monotonic()
        while not ranks.have_ended():
            assert time.monotonic() - begin < 30
            time.sleep(0.01)
    finally:
        ranks.kill()


def test_a_rank_that_cannot_start_is_told_with_the_end_of_its_log(tmp_path, forked):
    job = small_job(tmp_path, 3, [group(device="cuda:7")])
    with pytest.raises(UserError, match="no device 'cuda:7'"):
        to_end(job, plan_of((8, [[(0, 6)]])))
    words = Control(tmp_path, 0).words_of(0)
    assert words is not None
    assert words.kind == "chip"


LAUNCHER = """
import json, sys, time
from pathlib import Path
from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.run.job import Job
from mxn.train.run.launch import launch, launching_of

folder = Path(sys.argv[1])
job = Job.from_json((folder / "job.json").read_text())
plan = TrainPlan.from_json((folder / "plan.json").read_text())
ranks = launch(launching_of(job, plan))
(folder / "pids").write_text(json.dumps(ranks.pids()))
time.sleep(600)
"""


def test_ranks_end_when_their_launcher_is_gone(tmp_path):
    job = small_job(tmp_path, 100_000, [group()])
    (tmp_path / "job.json").write_text(job.to_json())
    (tmp_path / "plan.json").write_text(plan_of((8, [[(0, 6)]])).to_json())
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)])
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not losses(job):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()
    (rank,) = json.loads((tmp_path / "pids").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the rank outlived its launcher"
        time.sleep(0.05)


def test_devices_of_a_group_are_numbered_from_its_first():
    job = small_job(Path("/nowhere"), 1, [group("g", "sim:2", 2), group("c", "cpu", 3)])
    assert device_of(job, "g", 1) == "sim:3"
    assert device_of(job, "c", 2) == "cpu"
    with pytest.raises(UserError, match="device 2 of group 'g', which has 2"):
        device_of(job, "g", 2)


@pytest.mark.skipif(cpu_share.why_not() is not None, reason=str(cpu_share.why_not()))
def test_a_cpu_share_limits_a_rank_and_leaves_nothing_behind(tmp_path, forked):
    mine = f"cpu/mxn-{Owner.me()}-*"  # other tests run at the same time
    before = set(cpu_share.ROOT.glob(mine))
    job = small_job(tmp_path, 100_000, [group(cpu_share=0.2)])
    ranks = launch(launching_of(job, plan_of((8, [[(0, 6)]]))))
    try:
        wait_for_step(job, 0, ranks)
        used, begin = ranks.cpu_s()[0], time.monotonic()
        time.sleep(2)
        share = (ranks.cpu_s()[0] - used) / (time.monotonic() - begin)
        assert share <= 0.25
    finally:
        ranks.kill()
    assert set(cpu_share.ROOT.glob(mine)) == before
