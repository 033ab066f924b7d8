"""What is told of shared-out micro-batches: to people, in predictions, by `status`."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import replace

from mxn.cli.train_progress import status_lines
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import FLOAT32
from mxn.train.plan.search.choices import Limits
from mxn.train.run import counts_log, counts_told, session
from mxn.train.run.counts_told import CountsTold
from mxn.train.run.job import RebalanceSettings
from mxn.train.run.prepare import Task, plan_of_job
from mxn.train.run.rebalance import Change, with_counts
from mxn.train.run.session import Checks, keep_counts, micro_batches, predicted
from mxn.train.run.supervise.status import Status
from support import tiny_plans
from support.launches import group, small_job


def plan(*counts):
    pipelines = (
        tiny_plans.pipeline([8], ["a"], count, first_device=number)
        for number, count in enumerate(counts)
    )
    return tiny_plans.plan(*pipelines)


def change(step, before, after):
    return Change(
        step=step, before=before, after=after, each_s=(1.0, 2.0), step_s=12.0, predicted_s=8.0
    )


def test_what_ranks_decide_is_said_once_and_the_plan_is_kept_with_its_counts(tmp_path):
    planned, said, kept = plan(6, 6), [], []
    counts_log.append(tmp_path, planned.fingerprint, change(7, (6, 6), (8, 4)))
    now = [None]
    told = CountsTold(tmp_path, plan=lambda: now[0], say=said.append, keep=kept.append)
    told.look()
    assert kept == []  # no plan yet
    now[0] = planned
    told.look()
    told.look()
    assert said == []  # by an earlier command
    assert kept == [with_counts(planned, (8, 4))]
    counts_log.append(tmp_path, planned.fingerprint, change(22, (8, 4), (9, 3)))
    told.look()
    assert [text.split(":")[0] for text in said] == ["micro-batches 8"]
    assert kept[1:] == [with_counts(planned, (9, 3))]
    now[0] = with_counts(planned, (6, 6))  # planned again: its prediction was written anew
    told.look()
    assert kept[2:] == [with_counts(planned, (9, 3))]
    assert len(said) == 1


def test_what_fails_once_does_not_end_the_telling(tmp_path, monkeypatch, caplog):
    planned, kept, problems = plan(6, 6), [], [OSError("full"), OSError("full")]

    def keep(plan):
        if problems:
            raise problems.pop()
        kept.append(plan)

    monkeypatch.setattr(counts_told, "_POLL_S", 0.001)
    with CountsTold(tmp_path, plan=lambda: planned, say=lambda text: None, keep=keep):
        counts_log.append(tmp_path, planned.fingerprint, change(7, (6, 6), (8, 4)))
        end = time.monotonic() + 5
        while not kept and time.monotonic() < end:
            time.sleep(0.01)
        assert kept == [with_counts(planned, (8, 4))]
    assert caplog.text.count("cannot be told now") == 1
    assert "full" in caplog.text


def task_on(*names):
    pool = tiny_plans.cluster()
    left = Cluster(groups=tuple(group for group in pool.groups if group.name in names))
    return Task(
        shape=tiny_plans.shape(6), rows=8, cluster=pool if len(names) == 2 else left,
        profiles=tiny_plans.PROFILES, memory=FLOAT32, limits=Limits(),
    )  # fmt: skip


def test_an_old_plan_is_not_predicted_on_the_groups_that_are_left(tmp_path, monkeypatch):
    """Group b is dropped while the thread that follows the counts still has the plan with it."""
    both = tiny_plans.plan(*(tiny_plans.pipeline([8], [name], 4) for name in "ab"))
    alone = tiny_plans.plan(
        *(tiny_plans.pipeline([8], ["a"], 4, first_device=number) for number in (0, 1))
    )
    checks = Checks(lambda text: None, tmp_path)

    def make(plan, *names):
        (tmp_path / "plan.json").write_text(plan.to_json())
        devices = [group(name) for name in names]
        job = small_job(tmp_path, 3, devices, micro_batch=1, global_batch=8)
        job = replace(job, plan=replace(job.plan, file=str(tmp_path / "plan.json")))
        monkeypatch.setattr(session, "task_of_job", lambda *_, **__: task_on(*names))
        assert checks.make_plan(job, names) == plan

    def told():
        kept = predicted(tmp_path)
        return kept["plan"], kept["micro_batches"]

    def planned_slowly(job, task):
        checks.foretell(with_counts(both, (5, 3)))
        return plan_of_job(job, task)

    make(both, "a", "b")
    checks.foretell(other := with_counts(both, (6, 2)))
    assert told() == (other.fingerprint, [6, 2])
    monkeypatch.setattr(session, "plan_of_job", planned_slowly)
    make(alone, "a")
    checks.foretell(with_counts(both, (5, 3)))
    assert told() == (alone.fingerprint, [4, 4])
    checks.foretell(other := with_counts(alone, (3, 5)))
    assert told() == (other.fingerprint, [3, 5])


def test_a_full_disk_costs_the_prediction_and_not_the_plan(tmp_path, monkeypatch):
    def no_room(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    planned = tiny_plans.plan(*(tiny_plans.pipeline([8], [name], 4) for name in "ab"))
    (tmp_path / "plan.json").write_text(planned.to_json())
    job = small_job(tmp_path, 3, [group("a"), group("b")], micro_batch=1, global_batch=8)
    job = replace(job, plan=replace(job.plan, file=str(tmp_path / "plan.json")))
    monkeypatch.setattr(session, "write_whole", no_room)
    said: list[str] = []
    got = session.make_plan(job, ("a", "b"), task=task_on("a", "b"), on_say=said.append)
    assert got == planned
    assert "predicted.json cannot be written" in said[-1]


def test_status_shows_the_counts_of_now_and_those_planned(tmp_path):
    planned = plan(6, 6)
    assert micro_batches(tmp_path, planned.fingerprint) is None
    for one in (change(7, (6, 6), (8, 4)), change(22, (8, 4), (9, 3))):
        counts_log.append(tmp_path, planned.fingerprint, one)
    counts = micro_batches(tmp_path, planned.fingerprint)
    assert (counts["now"], counts["planned"], counts["since_step"]) == ((9, 3), (6, 6), 22)
    told = Status(
        job="small", phase="running", reason="", groups=("a",), dropped={}, launch=1, restarts=0,
        checkpoint_step=None, plan=planned.fingerprint, pid=1, started=0, updated_at=0.0,
    )  # fmt: skip
    lines = status_lines(tmp_path, told, None, counts)
    assert "  micro-batches 9:3 since step 23, as measured; planned 6:6" in lines
    assert json.loads(json.dumps(counts))["changes"][0]["after"] == [8, 4]


def test_a_job_without_checkpoints_or_that_keeps_its_counts_forgets_earlier_ones(tmp_path):
    job = small_job(tmp_path, 3, [group()])
    for kept in (job, replace(job, rebalance=RebalanceSettings(when="never"))):
        counts_log.append(tmp_path, "p", change(7, (6, 6), (8, 4)))
        keep_counts(kept)
        assert counts_log.read_all(tmp_path) == []
