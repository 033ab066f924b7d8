"""What a job's folder may hold when a job begins in it, and what a job must not name."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mxn.errors import UnsupportedError, UserError
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run import held
from mxn.train.run.checkpoint import Checkpointer, Position
from mxn.train.run.checkpoint.writer import Identity
from mxn.train.run.from_job import open_job, settings_of
from mxn.train.run.job import Job
from mxn.train.run.job_file import read_job
from mxn.train.run.login import without_login
from mxn.train.run.prepare import plan_of_job
from mxn.train.run.session import keep_job, kept_job, run_job
from mxn.train.run.supervise.files import held_folders
from mxn.train.run.supervise.shell import Supervisor


@pytest.fixture
def job(tmp_path) -> Job:
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    path = tmp_path / "job.yaml"
    path.write_text("""
model: mxn-shakespeare-llama
data: {files: text.txt}
seq_tokens: 16
global_batch: 4
steps: 20
devices: [{name: a, device: cpu}]
""")
    return read_job(path, out=tmp_path / "out")


def finish(job: Job) -> None:
    """Leave the folder as a job that did its last step does."""
    identity = Identity(
        job=f"{job.fingerprint}-rows", plan="p", plan_json="{}", num_layers=1, num_ranks=1,
        launch=1, told=settings_of(job),
    )  # fmt: skip
    writer = Checkpointer(Path(job.checkpoint.folder), rank=0, identity=identity, keep=1)
    writer.save(Position(step=job.steps or 0, micro_batch=0), {0: {"w": torch.zeros(1)}})
    writer.close()
    keep_job(job)


def test_a_finished_job_is_done_and_another_one_in_its_folder_is_not(job):
    finish(job)
    assert run_job(job, on_say=lambda text: None).phase == "done"
    other = replace(job, seed=1, steps=10)
    with pytest.raises(UserError, match="seed: 0 then, 1 now"):
        run_job(other)
    assert kept_job(Path(job.out)).seed == 0  # an export still finds the job it belongs to


def test_who_comes_second_writes_nothing(job):
    keep_job(job)
    first = Supervisor(
        job,
        ("a",),
        make_plan=lambda job, groups: pytest.fail("begun"),
        run_gate=lambda job, plan: None,
        launch=lambda launching: pytest.fail("begun"),
    )
    with first.held(), pytest.raises(UserError, match="another `mxn train run` is at work"):
        run_job(replace(job, seed=1))
    assert kept_job(Path(job.out)).seed == 0


@pytest.mark.parametrize("place", ["file", "file/checkpoints"])
def test_a_folder_of_checkpoints_that_cannot_be_made_is_said(job, tmp_path, place):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / place
    other = replace(job, checkpoint=replace(job.checkpoint, folder=str(folder)))
    with pytest.raises(UserError, match="the folder of the checkpoints, cannot be used") as caught:
        run_job(other)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_said_and_used(job, monkeypatch, caplog, number):
    def flock(handle: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(held.fcntl, "flock", flock)
    with held_folders(job):
        assert Path(job.checkpoint.folder).is_dir()
    assert "the folder of the job, cannot be locked" in caplog.text
    assert "the folder of the checkpoints, cannot be locked" in caplog.text


def test_checkpoints_in_the_folder_of_the_job_are_locked_once(job, tmp_path):
    Path(job.out).mkdir()
    link = tmp_path / "link"
    link.symlink_to(job.out)
    with held_folders(replace(job, checkpoint=replace(job.checkpoint, folder=str(link)))):
        pass


def test_a_plan_for_other_micro_batches_is_refused(job, tmp_path):
    stage = Stage(group="a", first_device=0, chunks=(Chunk(first=0, end=6),))
    plan = TrainPlan(
        model="m", num_layers=6, seq_tokens=16, micro_batch=2,
        pipelines=(Pipeline(stages=(stage,), micro_batches=2),),
    )  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    task = SimpleNamespace(predict=lambda plan: None)
    job = replace(job, plan=replace(job.plan, file=str(path)))
    with pytest.raises(UserError, match="4 rows in micro-batches of 2, the job has 4 in 1"):
        plan_of_job(job, task)
    assert plan_of_job(replace(job, micro_batch=2), task)[0] == plan


def test_an_adapter_target_that_no_matrix_answers_is_refused(job, tmp_path):
    path = tmp_path / "lora.yaml"
    text = (tmp_path / "job.yaml").read_text()
    path.write_text(text + "method: lora\nlora: {targets: [q_proj, qproj]}\n")
    with pytest.raises(UnsupportedError, match="'qproj' is no matrix of this model"):
        open_job(read_job(path))
    path.write_text(text + "method: lora\nlora: {targets: [q_proj]}\n")
    assert open_job(read_job(path)).settings.lora is not None


def test_documents_that_lose_their_end_are_counted(job, tmp_path, caplog):
    path = tmp_path / "fit.yaml"
    text = (tmp_path / "job.yaml").read_text()
    path.write_text(text.replace("text.txt}", "text.txt, packing: fit}"))
    open_job(read_job(path))
    assert "1 of 1 documents are longer than a row (seq_tokens 16)" in caplog.text


def test_a_password_of_a_tracking_server_is_not_shown():
    assert without_login("http://me:secret@host:5000/x") == "http://***@host:5000/x"
    assert without_login("sqlite:///a@b.db") == "sqlite:///a@b.db"
