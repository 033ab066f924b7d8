"""Ranks of real mixed jobs are killed, and the job ends with the losses of an undisturbed one.

The supervisor, the ranks, their bridge and checkpoints are the real ones; only the planner is a
table, so that each test knows which rank holds what.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mxn.chips.sim.testing import sim
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run.checkpoint import Stored
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.job import Job
from mxn.train.run.job_file import read_job
from mxn.train.run.supervise.shell import Supervisor
from mxn.train.run.track import read_metrics
from support.forked_ranks import ForkedRanks

__all__ = ["sim"]

TEXT = Path(__file__).parents[3] / "recipes" / "data" / "tinyshakespeare.txt"
NUM_LAYERS = 6
STEPS = 12
MICRO_BATCHES = 4


def pipeline(*groups: tuple[str, int], micro_batches: int = MICRO_BATCHES) -> Pipeline:
    """A pipeline of (group, layers behind its last) stages."""
    stages, at = [], 0
    for group, end in groups:
        stages.append(Stage(group=group, first_device=0, chunks=(Chunk(first=at, end=end),)))
        at = end
    return Pipeline(stages=tuple(stages), micro_batches=micro_batches)


PLANS = {
    "pipeline": {
        ("a", "b"): (pipeline(("a", 2), ("b", NUM_LAYERS)),),
        ("a",): (pipeline(("a", NUM_LAYERS)),),
        ("b",): (pipeline(("b", NUM_LAYERS)),),
    },
    "data": {
        ("a", "b"): (
            pipeline(("a", NUM_LAYERS), micro_batches=3),
            pipeline(("b", NUM_LAYERS), micro_batches=1),
        ),
        ("a",): (pipeline(("a", NUM_LAYERS)),),
        ("b",): (pipeline(("b", NUM_LAYERS)),),
    },
}


class Run:
    """A job under a real supervisor, with a hand that kills ranks beside it."""

    def __init__(self, job: Job, kind: str, env: dict[str, dict[str, str]] | None = None, **parts):
        self.job, self.kind, self.env = job, kind, env or {}
        self.launches: list[ForkedRanks] = []
        self.planned: list[tuple[str, ...]] = []
        self.supervisor = Supervisor(
            job, ("a", "b"), make_plan=self._plan, run_gate=lambda job, plan: None,
            launch=self._launch, **parts,
        )  # fmt: skip

    def _plan(self, job: Job, groups: tuple[str, ...]) -> TrainPlan:
        self.planned.append(groups)
        return TrainPlan(
            model="test", num_layers=NUM_LAYERS, seq_tokens=job.seq_tokens,
            micro_batch=job.micro_batch, pipelines=PLANS[self.kind][groups],
        )  # fmt: skip

    def _launch(self, launching) -> ForkedRanks:
        self.launches.append(ForkedRanks(launching, self.env.get(str(launching.launch), {})))
        return self.launches[-1]

    def finish(self):
        state = self.supervisor.run()
        logs = [
            f"{log}: {log.read_text()[-600:]}"
            for log in sorted(Path(self.job.out).glob("log/*/*.log"))
        ]
        assert state.phase == "done", "\n".join([state.reason, *logs])
        return state

    @property
    def steps_done(self) -> int:
        return len(read_metrics(Path(self.job.out) / "metrics.jsonl"))

    def losses(self) -> list[float]:
        rows = read_metrics(Path(self.job.out) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(self.job.steps))
        return [row["loss"] for row in rows]

    def kill_in_launch(self, launch: int, rank: int, behind_step: int) -> threading.Thread:
        """Kill a rank of a launch once so many steps are written down."""

        def kill() -> None:
            wait_for(lambda: len(self.launches) >= launch and self.steps_done > behind_step)
            os.kill(self.launches[launch - 1].pids[rank], signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        return thread


def wait_for(condition, timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it did not come")
        time.sleep(0.005)


def weights(job: Job) -> dict:
    folder = Path(job.checkpoint.folder) / manifests.folder_name(job.steps)
    stored = Stored.open(folder)
    return {n: t for layer in range(NUM_LAYERS) for n, t in stored.layer(layer).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT.read_text()[:30_000])
    return path


@pytest.fixture(scope="module")
def make_job(data):
    def make(folder: Path, second: str = "cpu") -> Job:
        folder.mkdir(exist_ok=True)
        path = folder / "job.yaml"
        path.write_text(f"""
model: mxn-shakespeare-llama
data: {{files: {data}}}
seq_tokens: 32
global_batch: {MICRO_BATCHES}
steps: {STEPS}
devices: [{{name: a, device: cpu}}, {{name: b, device: "{second}"}}]
optimizer: {{lr: 1e-4, warmup_steps: 3, schedule: constant}}
checkpoint: {{every_steps: 3, keep: 100}}
faults: {{backoff_s: 0.01, stall_s: 280, grow_every_s: 0.01, max_restarts: 9, drop_after: 99}}
rebalance: false  # runs are compared to the bit
seed: 3
""")
        return read_job(path, out=folder / "out")

    return make


@pytest.fixture(scope="module", params=["pipeline", "data"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(kind, make_job, tmp_path_factory):
    """Job, losses and last state of a run that nothing happens to."""
    job = make_job(tmp_path_factory.mktemp("calm") / kind)
    run = Run(job, kind)
    assert run.finish().launch == 1
    return run.losses(), weights(job)


@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_killed_at_any_step_changes_nothing(kind, rank, make_job, undisturbed, tmp_path):
    """Twice in one job, behind random steps: the second time ranks had been restarted already."""
    job = make_job(tmp_path)
    run = Run(job, kind)
    chosen = sorted(random.Random(f"{kind}{rank}").sample(range(STEPS - 1), 2))
    for launch, step in enumerate(chosen, 1):
        run.kill_in_launch(launch, rank, step)
    state = run.finish()
    assert state.launch == 3
    assert run.supervisor.said[0].startswith(f"rank {rank} (group {'ab'[rank]!r}) was killed")
    losses, final = undisturbed
    assert run.losses() == losses  # bit for bit
    assert all((tensor == final[name]).all() for name, tensor in weights(job).items())


def test_killed_while_checkpoints_are_written_each_step(kind, make_job, undisturbed, tmp_path):
    job = make_job(tmp_path)
    job = replace(job, checkpoint=replace(job.checkpoint, every_steps=1, keep=2))
    run = Run(job, kind)
    seen: list[Path] = []

    def kill() -> None:
        for launch in (1, 2):
            wait_for(lambda launch=launch: len(run.launches) >= launch)
            before = run.steps_done
            wait_for(lambda before=before: run.steps_done > before)
            wait_for(lambda: manifests.partials(Path(job.checkpoint.folder)))  # being written
            os.kill(run.launches[launch - 1].pids[launch - 1], signal.SIGKILL)
            seen.extend(manifests.partials(Path(job.checkpoint.folder)))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert run.finish().launch == 3
    thread.join()
    assert seen
    assert manifests.partials(Path(job.checkpoint.folder)) == []
    assert run.losses() == undisturbed[0]


class Answers:
    def answer(self) -> bool:
        return True


def test_a_group_is_dropped_the_rest_goes_on_and_it_comes_back(
    kind, make_job, undisturbed, tmp_path
):
    job = make_job(tmp_path)
    job = replace(job, faults=replace(job.faults, drop_after=1))
    run = Run(job, kind, start_probe=lambda job, group: Answers())
    run.kill_in_launch(1, 1, 4)
    run.finish()
    assert run.planned == [("a", "b"), ("a",), ("a", "b")]
    assert run.losses() == pytest.approx(undisturbed[0], rel=2e-6)
    last = read_metrics(Path(job.out) / "metrics.jsonl")[-1]
    assert "rank1_busy_s" in last  # the group that came back works


@pytest.mark.sim
def test_a_chip_that_falls_off_the_bus_is_dropped_and_the_job_ends(make_job, sim, tmp_path):
    """The simulated chip is another maker's: its ranks meet the CPU over the bridge."""
    job = make_job(tmp_path, "sim:0")
    job = replace(job, faults=replace(job.faults, drop_after=2, grow=False))
    broken = {"MXN_SIM_FAIL_AFTER": "4000"}
    run = Run(job, "pipeline", env={"1": broken, "2": broken})
    state = run.finish()
    assert run.planned == [("a", "b"), ("a",)]
    assert "AcceleratorError" in state.dropped["b"].reason
    calm = Run(make_job(tmp_path / "calm"), "pipeline")
    calm.finish()
    assert run.losses() == pytest.approx(calm.losses(), rel=2e-6)


@pytest.mark.slow
def test_every_other_plan_goes_on_from_a_checkpoint(kind, make_job, undisturbed, tmp_path):
    """From two ranks to the first alone, to the second alone, and back to the other cut."""
    job = make_job(tmp_path)
    other = "data" if kind == "pipeline" else "pipeline"
    both = ("a", "b")
    for steps, groups, how in ((4, both, kind), (7, ("a",), kind), (9, ("b",), kind)):
        run = Run(replace(job, steps=steps), how)
        run.supervisor._groups = groups
        run.finish()
    last = Run(job, other)
    last.finish()
    assert last.losses() == pytest.approx(undisturbed[0], rel=2e-6)
