"""A rank that is a job of its own: one device, the whole model, real checkpoints. For fault tests.

It goes through the same loop as a rank of many; only the sums over other ranks are left out. It is
forked from a process that has loaded torch already, which saves seconds a launch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401 (a fork need not load it)

from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run.control import Control
from mxn.train.run.from_job import facts, open_job
from mxn.train.run.job import Job
from mxn.train.run.keeper import Keeper
from mxn.train.run.single import SingleTrainer
from mxn.train.run.track import Tracker
from support.forks import forkserver


def one_stage_plan(job: Job, num_layers: int, group: str) -> TrainPlan:
    """All layers on device 0 of a group."""
    stage = Stage(group=group, first_device=0, chunks=(Chunk(first=0, end=num_layers),))
    return TrainPlan(
        model="test", num_layers=num_layers, seq_tokens=job.seq_tokens,
        micro_batch=job.micro_batch,
        pipelines=(Pipeline(stages=(stage,), micro_batches=job.micro_batches),),
    )  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """End by signal 9 behind a step of a launch."""

    launch: int
    step: int


def start(
    job: Job, launch: int, resume: int | None, log: Path, kill: Kill | None
) -> multiprocessing.Process:
    """Return the running process. `exitcode` is below 0 for a signal."""
    arguments = (job, launch, resume, str(log), kill)
    process = forkserver().Process(target=_main, args=arguments, daemon=True)
    process.start()
    return process


def _main(job: Job, launch: int, resume: int | None, log: str, kill: Kill | None) -> None:
    os.setsid()  # ctrl-c of a terminal is the supervisor's business
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    control = Control(Path(job.out), launch)
    try:
        run(job, control, resume, kill)
    except Exception as error:
        control.leave_words(0, error)
        raise


def run(job: Job, control: Control, resume: int | None, kill: Kill | None) -> None:
    opened = open_job(job)
    trainer = SingleTrainer(opened.source, opened.rows, opened.settings)
    plan = one_stage_plan(job, opened.source.num_layers, "a")
    keeper = Keeper(
        job, plan, rank=0, launch=control.launch, parts=[(trainer.stage, trainer.optimizer)],
        holders={layer: [0] for layer in range(plan.num_layers)}, num_ranks=1,
        facts=facts(job, opened),
    )  # fmt: skip
    position = keeper.resume(resume)
    trainer.step = position.step
    tracker = Tracker(Path(job.out), job.tracking, name=job.name, first_step=position.step)
    while trainer.step < opened.num_steps:
        step = trainer.step
        told = trainer.train_step()
        tracker.step(step, {"loss": told.loss, "norm": told.gradient_norm})
        is_last = step + 1 == opened.num_steps
        if keeper.obey(max(keeper.wish(step), float(is_last)), step + 1, told.num_tokens):
            keeper.close()
            return
        if kill == Kill(control.launch, step):
            # A checkpoint of an earlier step is whole; killed in the middle of one is another test.
            while keeper.writer.is_writing():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
    keeper.close()
    tracker.close()
    control.say_finished()
