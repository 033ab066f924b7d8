"""Real ranks of other speeds than planned: their micro-batches move, what is learnt does not."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mxn.train.run import counts_log, cpu_share
from mxn.train.run.checkpoint import Stored
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.job import CheckpointSettings, Job, RebalanceSettings, metrics_path
from mxn.train.run.launch import launch
from mxn.train.run.supervise.shell import Supervisor
from mxn.train.run.track import read_metrics
from support.forked_start import quickly
from support.launches import group, on_one_device, small_job
from support.parity_cases import plan_of

pytestmark = pytest.mark.skipif(
    cpu_share.why_not() is not None, reason=str(cpu_share.why_not())
)  # fmt: skip

STEPS = 14
EVEN = plan_of((12, [[(0, 6)]]), (12, [[(0, 6)]]))


def even_plan(job: Job):
    """A plan which takes the two groups for equal."""
    first, second = EVEN.pipelines
    stages = [
        tuple(replace(stage, group=name, first_device=0) for stage in pipeline.stages)
        for name, pipeline in (("fast", first), ("slow", second))
    ]
    return replace(
        EVEN,
        seq_tokens=job.seq_tokens,
        pipelines=(replace(first, stages=stages[0]), replace(second, stages=stages[1])),
    )


@pytest.fixture
def job(tmp_path):
    return small_job(
        tmp_path, STEPS,
        [group("fast", cpu_share=0.5), group("slow", cpu_share=0.25)],
        seq_tokens=64, global_batch=24,
        rebalance=RebalanceSettings(every_steps=4),
        checkpoint=CheckpointSettings(folder=str(tmp_path / "checkpoints"), every_steps=5, keep=9),
    )  # fmt: skip


def test_counts_follow_the_speeds_and_are_the_same_behind_a_restart(job, monkeypatch):
    quickly(monkeypatch)  # imports under a quota take longer than all steps
    launches, seen = [], []

    def start(launching):
        launches.append(launch(launching))
        return launches[-1]

    def steps():
        return read_metrics(metrics_path(job))

    def kill() -> None:
        """Behind step 9: counts changed behind step 6 or so, the checkpoint is of step 5."""
        end = time.monotonic() + 240
        while len(steps()) < 9 and time.monotonic() < end:
            time.sleep(0.02)
        seen.extend(steps())
        os.kill(launches[0].pids()[1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    planned = even_plan(job)
    supervisor = Supervisor(
        replace(job, faults=replace(job.faults, backoff_s=0.01)), ("fast", "slow"),
        make_plan=lambda job, groups: planned, run_gate=lambda job, plan: None, launch=start,
    )  # fmt: skip
    state = supervisor.run()
    thread.join()
    assert (state.phase, state.launch) == ("done", 2), state.reason
    first, *_ = changes = counts_log.read(Path(job.out), planned.fingerprint)
    assert (first.step, first.before) == (6, (12, 12))
    assert 13 <= first.after[0] <= 20  # 16 : 8 are right; a busy machine leaves other speeds
    assert first.each_s[1] / first.each_s[0] == pytest.approx(2, rel=0.5)
    # The metrics of the killed ranks were read before they were cut off.
    assert counts_log.begin(Path(job.out), planned.fingerprint, 0) >= 9
    rows = steps()
    assert [row["pipeline0_micro_batches"] for row in rows[:7]] == [12] * 6 + [first.after[0]]
    assert rows[-1]["pipeline0_micro_batches"] == changes[-1].after[0]
    for row, before in zip(rows, seen, strict=False):  # steps 5 to 8 were done twice
        for key in ("loss", "gradient_norm", "pipeline0_micro_batches"):
            assert row[key] == before[key]  # to the bit
    assert [row["loss"] for row in rows] == pytest.approx(on_one_device(job), rel=2e-5)
    stored = Stored.open(Path(job.checkpoint.folder) / manifests.folder_name(STEPS))
    told = json.loads(stored.manifest.plan_json)["pipelines"]
    assert tuple(pipeline["micro_batches"] for pipeline in told) == changes[-1].after
