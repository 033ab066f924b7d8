"""A supervisor with real processes: they are killed, stopped, restarted and dropped."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mxn.errors import CapacityError, ChipError, NotFoundError, UnsupportedError, UserError
from mxn.train.run import control, rank
from mxn.train.run.control import Control, ask, last_words
from mxn.train.run.job import CheckpointSettings, FaultSettings, Job
from mxn.train.run.job_file import read_job
from mxn.train.run.launch import RankSpec
from mxn.train.run.supervise import shell, status
from mxn.train.run.supervise import words as w
from mxn.train.run.supervise.files import last_line
from mxn.train.run.supervise.needs import GateError, NoPlaceError, SpeedError
from mxn.train.run.supervise.ranks import Death, Launching, culprit
from mxn.train.run.supervise.shell import Supervisor
from mxn.train.run.track import read_metrics
from support import one_rank
from support.one_rank import Kill

TEXT = Path(__file__).parents[3] / "recipes" / "data" / "tinyshakespeare.txt"
NUM_LAYERS = 6
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT.read_text()[:20_000])
    return path


@pytest.fixture
def job(tmp_path, data):
    path = tmp_path / "job.yaml"
    path.write_text(f"""
model: mxn-shakespeare-llama
data: {{files: {data}}}
seq_tokens: 16
micro_batch: 1
global_batch: 2
steps: {STEPS}
devices: [{{name: a, device: cpu}}, {{name: b, device: cpu}}]
checkpoint: {{every_steps: 3}}
faults: {{backoff_s: 0.01, stall_s: 280, grow_every_s: 0.1, max_restarts: 5}}
seed: 3
""")
    return read_job(path, out=tmp_path / "out")


class OneRank:
    """The `Ranks` of a launch with one process."""

    def __init__(self, launching: Launching, kill: Kill | None) -> None:
        self.group = launching.plan.pipelines[0].stages[0].group
        self.resume_step = launching.resume_step
        self.process = one_rank.start(
            launching.job, launching.launch, launching.resume_step,
            launching.log_folder / "rank-0.log", kill,
        )  # fmt: skip

    def deaths(self) -> list[Death]:
        code = self.process.exitcode
        return [Death(rank=0, group=self.group, code=code)] if code else []

    def have_ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Harness:
    """A supervisor whose planner puts everything on the first group that is left."""

    def __init__(self, job: Job, kill: Kill | None = None, **parts) -> None:
        self.launches: list[OneRank] = []
        self.plans: list[tuple[str, ...]] = []

        def make_plan(job, groups):
            self.plans.append(groups)
            return one_rank.one_stage_plan(job, NUM_LAYERS, groups[0])

        def launch(launching):
            self.launches.append(OneRank(launching, kill))
            return self.launches[-1]

        collaborators = {"make_plan": make_plan, "run_gate": lambda job, plan: None,
                         "launch": launch} | parts  # fmt: skip
        self.supervisor = Supervisor(job, ("a", "b"), **collaborators)
        self.out = Path(job.out)

    def run(self):
        return self.supervisor.run()

    def losses(self) -> list[float]:
        rows = read_metrics(self.out / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(len(rows)))
        return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def undisturbed():
    """Filled by the first test that asks for the losses of a job that nothing happens to."""
    return {}


def run_undisturbed(job: Job, cache: dict) -> list[float]:
    if "losses" not in cache:
        calm = Harness(replace(job, out=job.out + "-calm", checkpoint=CheckpointSettings(
            folder=job.out + "-calm/checkpoints", every_steps=None)))  # fmt: skip
        assert calm.run().phase == "done"
        cache["losses"] = calm.losses()
        assert len(cache["losses"]) == STEPS
    return cache["losses"]


def test_killed_behind_any_step_the_losses_are_those_of_the_undisturbed_run(job, undisturbed):
    wanted = run_undisturbed(job, undisturbed)
    harness = Harness(job, Kill(1, 4))
    state = harness.run()
    assert (state.phase, state.launch, state.restarts) == ("done", 2, 0)
    assert harness.launches[1].resume_step == 3  # one step is lost, which came behind it
    assert harness.losses() == wanted  # bit for bit
    assert "killed by signal 9" in harness.supervisor.said[0]


def test_killed_before_the_first_checkpoint_it_begins_again(job, undisturbed):
    harness = Harness(job, Kill(1, 0))
    assert harness.run().phase == "done"
    assert harness.launches[1].resume_step is None
    assert harness.losses() == run_undisturbed(job, undisturbed)


def test_a_group_that_dies_again_and_again_is_dropped(job, undisturbed):
    job = replace(job, faults=replace(job.faults, drop_after=1, grow=False))
    harness = Harness(job, Kill(1, 4))
    state = harness.run()
    assert state.phase == "done"
    assert list(state.dropped) == ["a"]
    assert harness.plans == [("a", "b"), ("b",)]
    assert harness.losses() == run_undisturbed(job, undisturbed)
    told = status.read(harness.out)
    assert (told.phase, told.groups) == ("done", ("b",))
    assert "killed by signal 9" in told.dropped["a"]
    assert told.last["step"] == STEPS - 1
    assert not told.is_alive


def test_a_group_whose_machine_is_gone_is_dropped_and_the_rest_goes_on(job, undisturbed):
    job = replace(job, faults=replace(job.faults, drop_after=2, grow=False))
    starts: list[int] = []

    def launch(launching):
        starts.append(launching.launch)
        if len(starts) == 2:  # behind the death of its rank there is no place for the next
            raise NoPlaceError("the cluster cannot hold 2 ranks now", group="a")
        return OneRank(launching, Kill(1, 4))

    harness = Harness(job, launch=launch)
    state = harness.run()
    assert (state.phase, starts) == ("done", [1, 2, 3])
    assert "cannot hold 2 ranks" in state.dropped["a"].reason
    assert harness.plans == [("a", "b"), ("b",)]
    assert harness.losses() == run_undisturbed(job, undisturbed)


@pytest.mark.parametrize(
    ("error", "num_launches"),
    [
        (NoPlaceError("no place", group=None), 6),
        (OSError(errno.ENOSPC, "no space left on device"), 6),
        (UnsupportedError("ranks on Ray are not pinned"), 1),
    ],
    ids=["place", "disk", "input"],
)
def test_ranks_that_cannot_start_are_tried_again_unless_the_input_is_wrong(
    job, error, num_launches
):
    starts: list[int] = []

    def launch(launching):
        starts.append(launching.launch)
        raise error

    state = Harness(job, launch=launch).run()
    assert (state.phase, len(starts)) == ("failed", num_launches)
    assert str(error) in state.reason


class Fine:
    def answer(self) -> bool:
        return True


def test_a_dropped_group_comes_back_when_it_answers(job, undisturbed):
    job = replace(job, steps=40, faults=replace(job.faults, drop_after=1))
    harness = Harness(job, Kill(1, 4), start_probe=lambda job, group: Fine())
    state = harness.run()
    assert state.phase == "done"
    assert harness.plans == [("a", "b"), ("b",), ("a", "b")]
    assert state.dropped == {}
    assert len(harness.losses()) == 40


def test_a_group_that_answers_and_cannot_be_planned_with_does_not_end_the_job(job, undisturbed):
    """One of its two devices is gone, and the other one answers."""
    job = replace(job, steps=40, faults=replace(job.faults, drop_after=1))
    plans: list[tuple[str, ...]] = []

    def make_plan(job, groups):
        plans.append(groups)
        if len(plans) == 3:
            raise NotFoundError("no device 'cuda:1'")
        return one_rank.one_stage_plan(job, NUM_LAYERS, groups[0])

    harness = Harness(
        job, Kill(1, 4), make_plan=make_plan, start_probe=lambda job, group: Fine()
    )  # fmt: skip
    assert harness.run().phase == "done"
    assert plans[:4] == [("a", "b"), ("b",), ("a", "b"), ("b",)]
    assert len(harness.losses()) == 40


def test_of_two_plans_in_one_look_the_last_is_told(job):
    harness = Harness(job)
    supervisor = harness.supervisor
    supervisor.out.mkdir()
    supervisor._obey((w.MakePlan(("a", "b")), w.MakePlan(("a",)), w.MakePlan(("a", "b"))))
    assert list(supervisor._events) == [w.Planned(("a", "b"))]


def test_a_user_drops_a_group_and_takes_it_back(job):
    job = replace(job, steps=4000)
    harness = Harness(job)
    thread = threading.Thread(target=harness.run)
    thread.start()
    try:
        wait_for(lambda: read_metrics(harness.out / "metrics.jsonl"))
        ask(harness.out, "drop", "a")
        wait_for(lambda: len(harness.launches) == 2)
        ask(harness.out, "grow", "a")
        wait_for(lambda: len(harness.launches) == 3)
        assert harness.launches[2].resume_step > 0
        ask(harness.out, "stop")
    finally:
        thread.join(280)
    assert harness.plans == [("a", "b"), ("b",), ("a", "b")]
    assert harness.supervisor.state.phase == "stopped"
    stopped_at = harness.supervisor.state.checkpoint_step
    assert len(harness.losses()) == stopped_at  # nothing that was learnt is lost


def test_ctrl_c_writes_a_last_checkpoint(job):
    job = replace(job, steps=4000, checkpoint=replace(job.checkpoint, every_steps=None))
    harness = Harness(job)

    def press() -> None:
        wait_for(lambda: len(read_metrics(harness.out / "metrics.jsonl")) > 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    state = harness.run()
    thread.join()
    assert state.phase == "stopped"
    assert state.checkpoint_step == len(harness.losses()) > 2
    again = Harness(replace(job, steps=state.checkpoint_step + 5))
    done = again.run()
    assert (done.phase, done.launch) == ("done", 2)  # what the first launch was asked is over
    assert [launch.resume_step for launch in again.launches] == [state.checkpoint_step]


@pytest.mark.parametrize("busy_in", ["make_plan", "run_gate"])
def test_ctrl_c_leaves_planning_and_checking_at_once(job, busy_in):
    began = threading.Event()

    def stay(job, _):
        began.set()
        for _ in range(
            300
        ):  # not one long sleep: it would not end if the signal comes just before it
            time.sleep(0.1)

    def press() -> None:
        assert began.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    harness = Harness(job, **{busy_in: stay})
    thread = threading.Thread(target=press)
    thread.start()
    start_s = time.monotonic()
    state = harness.run()
    thread.join()
    assert time.monotonic() - start_s < 15
    assert (state.phase, harness.launches) == ("stopped", [])
    assert status.read(harness.out).phase == "stopped"


def test_a_finished_job_that_is_given_more_steps_is_not_done_before_them(job):
    Harness(replace(job, steps=2)).run()
    longer = replace(job, steps=4000, checkpoint=replace(job.checkpoint, every_steps=None))
    harness = Harness(longer)

    def press() -> None:
        wait_for(lambda: len(read_metrics(harness.out / "metrics.jsonl")) > 4)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    state = harness.run()
    thread.join()
    assert (state.phase, state.launch) == ("stopped", 2)


def test_the_last_step_is_found_however_long_its_line_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    long = {f"rank{rank}_busy_s": 0.123456789 for rank in range(10_000)}
    path.write_text("".join(json.dumps({"step": step, **long}) + "\n" for step in (0, 1)) + '{"s')
    assert last_line(path) == {"step": 1, **long}
    path.write_text('{"step": 0}\n')
    assert last_line(path) == {"step": 0}
    path.write_text('{"st')
    assert last_line(path) == {}


def test_a_second_supervisor_stays_out(job):
    harness = Harness(job)
    with harness.supervisor.held(), pytest.raises(UserError, match="another `mxn train run`"):
        Harness(job).run()


def test_two_jobs_do_not_share_checkpoints_and_the_holder_is_named(job, tmp_path):
    other = replace(job, name="other", out=str(tmp_path / "elsewhere"))
    with Harness(job).supervisor.held():
        with pytest.raises(UserError) as caught:
            Harness(other).run()
        with pytest.raises(UserError, match=f"process {os.getpid()}, job {job.name!r}"):
            Harness(job).run()
    told = str(caught.value)
    assert f"{job.checkpoint.folder}, the folder of the checkpoints: process {os.getpid()}" in told
    assert f"job {job.name!r} with out {job.out}" in told
    with Harness(other).supervisor.held():
        pass  # it is free again
    in_one = replace(job, checkpoint=replace(job.checkpoint, folder=job.out))
    with Harness(in_one).supervisor.held():
        pass  # one folder for both is locked once


def test_a_folder_that_cannot_be_written_is_said(job, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder of the job, cannot be used: Not a directory"):
        Harness(replace(job, out=str(tmp_path / "file" / "out"))).run()


def test_another_job_does_not_go_on_in_the_folder(job):
    Harness(job).run()
    state = Harness(replace(job, seed=4, steps=STEPS + 1)).run()
    assert state.phase == "failed"
    assert "seed: 3 then, 4 now" in state.reason


def test_a_broken_checkpoint_stops_the_job_and_says_which_file(job):
    Harness(job).run()
    path = next((Path(job.checkpoint.folder) / f"step-{STEPS:08d}").glob("layer-00002*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=path.name):
        Harness(replace(job, steps=STEPS + 1)).run()
    intact = replace(job, steps=STEPS + 1, checkpoint=replace(job.checkpoint, resume="intact"))
    harness = Harness(intact)
    assert harness.run().phase == "done"
    assert harness.launches[0].resume_step == 6


def test_a_rank_that_hangs_is_stopped(job):
    job = replace(job, faults=FaultSettings(stall_s=0.5, max_restarts=0))

    def launch(launching):
        rank = OneRank(launching, None)
        os.kill(rank.process.pid, signal.SIGSTOP)  # no death, and no sign of life
        return rank

    state = Harness(job, launch=launch).run()
    assert state.phase == "failed"
    assert "no other sign of life" in state.reason


def test_the_gate_may_refuse_and_nothing_is_started(job):
    def refuse(job, plan):
        raise GateError("operator silu on sim:0: RMS ratio 3e-1 over 6e-3")

    harness = Harness(job, run_gate=refuse)
    state = harness.run()
    assert (state.phase, harness.launches) == ("failed", [])
    assert "silu" in state.reason


def test_a_chip_that_lies_is_planned_for_again(job):
    seen = []

    def measure(job, plan):
        seen.append(plan)
        if len(seen) == 1:
            raise SpeedError("chip x takes 3 times as long as its profile says", chip="x")

    harness = Harness(replace(job, steps=1), run_gate=measure)
    assert harness.run().phase == "done"
    assert len(harness.plans) == 2
    assert "planning again" in harness.supervisor.said[0]


def test_no_room_is_said(job):
    def refuse(job, groups):
        raise CapacityError("needs 3 GiB, device cpu has 2 GiB")

    assert "needs 3 GiB" in Harness(job, make_plan=refuse).run().reason


class Finished:
    """Ranks that have done all steps at once."""

    def __init__(self, launching: Launching) -> None:
        Control(Path(launching.job.out), launching.launch).say_finished()

    def deaths(self) -> list[Death]:
        return []

    def have_ended(self) -> bool:
        return True

    def kill(self) -> None:
        pass


def test_a_full_disk_costs_the_status_and_not_the_run(job, monkeypatch):
    def no_room(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status, "write_whole", no_room)
    monkeypatch.setattr(shell, "write_whole", no_room)
    harness = Harness(job, launch=Finished)
    assert harness.run().phase == "done"
    names = [text.split()[0] for text in harness.supervisor.said]
    assert names == ["status.json", "plan.json"]  # each once, however often it was tried


def test_a_rank_whose_words_find_no_room_ends_all_the_same(job, tmp_path, monkeypatch):
    """Python's own end would wait for threads that wait for peers."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rank, "run_rank", fail)
    monkeypatch.setattr(rank, "_end_with", lambda _: None)
    monkeypatch.setattr(control, "write_whole", fail)
    monkeypatch.setattr(rank.traceback, "print_exc", fail)
    monkeypatch.setattr(rank.os, "_exit", sys.exit)
    path = tmp_path / "rank-1.json"
    path.write_text(spec_of(job).to_json())
    with pytest.raises(SystemExit) as ended:
        rank.main(str(path))
    assert ended.value.code == 1


def test_blame_goes_to_who_went_first():
    from mxn.train.run.control import LastWords

    lost = LastWords(kind="peer", message="lost rank 1")
    deaths = [Death(rank=0, group="a", code=1, words=lost), Death(rank=1, group="b", code=-9)]
    assert culprit(deaths).group == "b"
    assert culprit(deaths[:1]).group is None


def spec_of(job: Job) -> RankSpec:
    return RankSpec(
        rank=1, group="b", device="cuda:99", island=None, store="", launch=1, resume_step=None,
        job=job.to_json(), plan="",
    )  # fmt: skip


def test_a_device_that_is_gone_is_its_groups_fault_and_no_wrong_input(job, monkeypatch):
    """A chip fell off the bus: its rank starts again, and nothing of that name is there."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the tests' own process
    spec = spec_of(job)
    with pytest.raises(ChipError, match=r"device is gone: .*'cuda:99'") as caught:
        rank._device(job, spec)
    words = last_words(caught.value, spec.device)
    assert (words.kind, words.device) == ("chip", "cuda:99")
    died = culprit([Death(rank=1, group="b", code=1, words=words)])
    assert (died.group, died.is_users) == ("b", False)


def wait_for(condition, timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
