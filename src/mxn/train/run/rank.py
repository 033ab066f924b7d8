"""The process of one rank: `python -m mxn.train.run.rank SPEC.json`.

Joins the others, loads its layers, trains its part of every step, saves where all agreed to, and
leaves words when it has to end. Rank 0 also writes the metrics. Start at `run_rank`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mxn.errors import ChipError, NotFoundError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run.control import Control
from mxn.train.run.job import Job
from mxn.train.run.launch import RankSpec
from mxn.train.run.placement import Placement

if TYPE_CHECKING:
    import torch

    from mxn.chips.chip import Device
    from mxn.train.run.bridge import Bridge
    from mxn.train.run.from_job import Opened
    from mxn.train.run.rank_step import RankStep
    from mxn.train.run.trainer import RankTrainer

log = logging.getLogger("mxn.train")

_ORPHAN_POLL_S = 1.0


def run_rank(spec: RankSpec) -> None:
    """Train until the job's last step, or until all ranks are asked to end.

    Raises: whatever ends it; the words for the supervisor are left by `main`.
    """
    from mxn.train.run.from_job import open_job
    from mxn.train.run.shares import open_share_of
    from mxn.train.run.trainer import RankTrainer

    job, plan = Job.from_json(spec.job), TrainPlan.from_json(spec.plan)
    placement = Placement(plan)
    device = _device(job, spec)
    opened = open_job(job)
    bridge = _connect(job, spec, placement, device)
    try:
        trainer = RankTrainer(
            opened.source,
            opened.rows,
            opened.settings,
            placement,
            bridge,
            dtypes=dtypes_of(job, placement),
            open_share=open_share_of(job, placement.plan, is_first=bridge.rank == 0),
        )
        _train(job, spec, opened, trainer)
    finally:
        bridge.close()


def dtypes_of(job: Job, placement: Placement) -> list[torch.dtype]:
    """Return the torch dtype that each rank computes in."""
    import torch

    groups = [placement.stage_of(place.rank).group for place in placement.places]
    return [getattr(torch, job.dtype_of(group)) for group in groups]


def _device(job: Job, spec: RankSpec) -> Device:
    """Raises: ChipError where the device, or all of its kind, cannot be found any more."""
    import torch

    from mxn.chips import find_device

    torch.set_num_threads(job.group(spec.group).threads)
    try:
        device = find_device(spec.device)
    except NotFoundError as error:
        # It was there when the job was planned: the chip's fault, not the user's.
        raise ChipError(f"device is gone: {error.message}", device=spec.device) from error
    target = torch.device(device.torch_device)
    if target.type != "cpu":
        torch.accelerator.set_device_index(target.index or 0)
    log.info("rank %d runs on %s (%s)", spec.rank, device.id, device.chip)
    return device


def _connect(job: Job, spec: RankSpec, placement: Placement, device: Device) -> Bridge:
    from mxn.train.run.bridge import Bridge, BridgeOptions, LinkLimit

    rate = job.group(spec.group).link_bytes_per_s
    options = BridgeOptions(
        timeout_s=job.faults.stall_s,
        # Under a quota imports alone may take minutes; the supervisor sees a rank that has ended.
        connect_timeout_s=max(60.0, job.faults.stall_s),
        wire_dtype=job.plan.wire_dtype,
        limit=LinkLimit(bytes_per_s=rate) if rate is not None else None,
    )
    return Bridge.connect(
        spec.store, spec.rank, placement.num_ranks, device, island=spec.island, options=options
    )


def _train(job: Job, spec: RankSpec, opened: Opened, trainer: RankTrainer) -> None:
    from mxn.train.run.from_job import facts
    from mxn.train.run.keeper import SAVE_AND_END, Keeper
    from mxn.train.run.shares import Shares
    from mxn.train.run.track import Tracker

    placement = trainer.placement
    control = Control(Path(job.out), spec.launch)
    keeper = Keeper(
        job,
        placement.plan,
        rank=spec.rank,
        launch=spec.launch,
        parts=list(zip(trainer.chunks, trainer.optimizers, strict=True)),
        holders=placement.holders(placement.places[spec.rank].index),
        num_ranks=placement.num_ranks,
        facts=facts(job, opened),
        loss_scale=trainer.loss_scale,
        before_save=trainer.align,
    )
    trainer.step = keeper.resume(spec.resume_step).step
    trainer.align(judge=False)  # chips with another dtype begin with other roundings
    shares = Shares(job, trainer, keeper)  # reads the metrics, which the tracker cuts off
    tracker = None
    if spec.rank == 0:
        tracker = Tracker(Path(job.out), job.tracking, name=job.name, first_step=trainer.step)
        tracker.params(facts(job, opened) | {"plan": placement.plan.fingerprint})
        for name in ("plan.json", "predicted.json", "explain.txt"):
            tracker.artifact(name)
    is_asked_to_end = False
    while trainer.step < opened.num_steps and not is_asked_to_end:
        step = trainer.step
        wish = keeper.wish(step)
        if step + 1 == opened.num_steps:
            wish = SAVE_AND_END
        told = trainer.train_step(int(wish))
        if tracker is not None:
            positions = job.global_batch * job.seq_tokens
            tracker.step(step, metrics(told, positions) | keeper.costs())
        is_asked_to_end = keeper.obey(float(told.flags), step + 1, told.log.num_tokens)
        if not is_asked_to_end:
            shares.look(told)
    keeper.close()
    trainer.bridge.barrier("the end of the job")
    is_finished = trainer.step >= opened.num_steps
    if tracker is not None:
        tracker.close("FINISHED" if is_finished else "KILLED")
        if is_finished:
            control.say_finished()


def metrics(told: RankStep, positions: int) -> dict[str, float | int | None]:
    """Return a step as a line of metrics. `positions`: tokens of all its rows, as predictions count
    them; fewer are learned where some have no label.
    """
    log_ = told.log
    values: dict[str, float | int | None] = {
        "loss": log_.loss if math.isfinite(log_.loss) else None,  # JSON has no other numbers
        "num_tokens": log_.num_tokens,
        "seconds": log_.seconds,
        "tokens_per_s": positions / log_.seconds,
        "learned_tokens_per_s": log_.num_tokens / log_.seconds,
        "learning_rate": log_.learning_rate,
        "gradient_norm": log_.gradient_norm if log_.is_taken else None,
    }
    if log_.loss_scale != 1 or not log_.is_taken:
        values |= {"loss_scale": log_.loss_scale, "is_taken": int(log_.is_taken)}
    if len(told.counts) > 1:
        for number, count in enumerate(told.done):
            values[f"pipeline{number}_micro_batches"] = count
    for rank, times in enumerate(told.times):
        values[f"rank{rank}_busy_s"] = times.busy_s
        values[f"rank{rank}_waited_s"] = times.waited_s
        values[f"rank{rank}_reduce_s"] = times.reduce_s
    return values


def main(path: str) -> int:
    """Run the rank of a spec file and return the exit status."""
    spec = RankSpec.from_json(Path(path).read_text(encoding="utf-8"))
    job = Job.from_json(spec.job)
    logging.basicConfig(
        level=job.log.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s rank {spec.rank} %(levelname)s %(message)s",
    )
    _end_with(os.getppid())
    try:
        run_rank(spec)
    except BaseException as error:
        Control(Path(job.out), spec.launch).leave_words(spec.rank, error, spec.device)
        with suppress(OSError):  # its log may be on a full disk
            traceback.print_exc()
            sys.stderr.flush()
        # Threads may still wait for peers that are gone; nothing of this process is of use now.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    return 0


def _end_with(parent: int) -> None:
    """End when the launcher is gone, however it went: nobody would end this rank any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHAN_POLL_S)
        log.error("the launcher is gone")
        os._exit(1)

    threading.Thread(target=watch, name="mxn-orphan", daemon=True).start()


def leave(status: int) -> NoReturn:
    """End this process without tearing Python down.

    A thread that waits inside gloo or autograd while Python ends aborts the process, also after
    all work was done and stored.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
