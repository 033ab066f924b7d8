"""Everything a job needs, put together: plan, gate, ranks, supervision. Start at `run_job`.

The job, its plan and what the plan is predicted to do lie in the job's folder, so that a later
command knows them: `job.json`, `plan.json`, `predicted.json`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mxn.errors import ConfigError, NotFoundError, UserError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run import counts_log
from mxn.train.run.control import write_whole
from mxn.train.run.job import Job
from mxn.train.run.login import hide_login
from mxn.train.run.prepare import Task, plan_of_job, task_of_job, with_devices
from mxn.train.run.rebalance import counts_of, same_cut

if TYPE_CHECKING:
    from mxn.train.plan.prediction import Prediction
    from mxn.train.run.measure import Measured
    from mxn.train.run.supervise.words import State

log = logging.getLogger("mxn.train")

Say = Callable[[str], None]


def run_job(job: Job, *, ray: str | None = None, on_say: Say = log.info) -> State:
    """Plan, check and run a job to its end, through faults; return its last state.

    A checkpoint in the job's folder is gone on from, as the job's `resume` says. `ray`: address of
    a Ray cluster whose machines the ranks run on; devices are measured and checked on this one.
    Raises: UserError when another command runs the job, or a checkpoint is broken.
    """
    from mxn.train.run.counts_told import CountsTold
    from mxn.train.run.launch import launch
    from mxn.train.run.launch_ray import launch_on_ray
    from mxn.train.run.probe import start_probe
    from mxn.train.run.supervise.shell import Supervisor
    from mxn.train.run.supervise.words import State

    job = with_devices(hide_login(job))
    checks = Checks(on_say, Path(job.out))
    supervisor = Supervisor(
        job,
        tuple(group.name for group in job.devices),
        make_plan=checks.make_plan,
        run_gate=checks.run_gate,
        launch=launch if ray is None else partial(launch_on_ray, address=ray),
        start_probe=start_probe,
        on_say=on_say,
    )
    with supervisor.held():  # before the folder is written to: another command may be at work there
        keep_job(job)
        keep_counts(job)
        if (steps := _steps_done(job)) is None:
            with CountsTold(
                Path(job.out),
                plan=lambda: supervisor.plan,
                say=supervisor.say,
                keep=checks.foretell,
            ):
                return supervisor.run()
        on_say(f"all {steps} steps are done")
        return State(groups=tuple(g.name for g in job.devices), phase="done", checkpoint_step=steps)


class _Planned(NamedTuple):
    groups: tuple[str, ...]
    task: Task
    plan: TrainPlan


class Checks:
    """Plans of a job and the checks before it starts, which ask what a plan was made from."""

    def __init__(self, on_say: Say, out: Path) -> None:
        from mxn.train.run.gate.process import Gate

        self._on_say, self._out = on_say, out
        self._parity = Gate(on_say=on_say)
        self._planned: _Planned | None = None
        self._lock = threading.Lock()  # of it, and of the prediction in the job's folder
        self._is_fresh = False  # the profiles were measured a moment ago, by the speed check

    def make_plan(self, job: Job, groups: tuple[str, ...]) -> TrainPlan:
        """As `session.make_plan`."""
        with self._lock:  # an old plan's prediction must not be written over the new one's
            self._planned = None
        task = task_of_job(job, groups=groups, on_progress=self._on_say)
        plan = make_plan(job, groups, task=task, on_say=self._on_say)
        with self._lock:
            self._planned = _Planned(groups, task, plan)
        return plan

    def foretell(self, plan: TrainPlan) -> None:
        """Keep what the last plan is predicted to do with other micro-batches; not an earlier one.

        Another thread's, which may still have the plan of groups that are gone.
        """
        with self._lock:
            planned = self._planned
            if planned is not None and same_cut(planned.plan, plan):
                _keep_prediction(self._out, plan, planned.task.predict(plan))

    def run_gate(self, job: Job, plan: TrainPlan) -> None:
        """Raises: GateError, SpeedError."""
        self._parity(job, plan)
        if self._is_fresh or job.gate.speed == "ignore" or self._planned is None:
            self._is_fresh = False
            return
        measured = self._planned.task.measured
        if measured is not None:
            self._check_speed(job, self._planned.groups, measured)

    def _check_speed(self, job: Job, groups: tuple[str, ...], measured: Measured) -> None:
        from mxn.train.run.gate.speed import check_speed
        from mxn.train.run.measure import measure_layers
        from mxn.train.run.supervise.shell import SpeedError

        try:
            check_speed(job, groups, measured, measure_layers)
        except SpeedError:
            self._is_fresh = True
            raise


def make_plan(
    job: Job, groups: tuple[str, ...], *, task: Task | None = None, on_say: Say = log.info
) -> TrainPlan:
    """Return the plan for the groups that are left, and keep what it is predicted to do.

    Raises: CapacityError when they cannot hold the job.
    """
    task = task or task_of_job(job, groups=groups, on_progress=on_say)
    if len(groups) < len(job.devices) and job.plan.file is not None:
        on_say(f"{job.plan.file} is for all groups: searching a plan for {', '.join(groups)}")
        found = task.search()
        plan, prediction = found.best.plan, found.best.prediction
    else:
        plan, prediction, _ = plan_of_job(job, task)
    on_say(
        f"plan {plan.fingerprint}: {plan.num_devices} devices, predicted "
        f"{prediction.iteration_s:.3g} s a step, {prediction.tokens_per_s:,.0f} tokens/s "
        f"({prediction.basis})"
    )
    try:
        _keep_prediction(Path(job.out), plan, prediction)
    except OSError as error:  # a full disk: the job can be trained without
        on_say(f"predicted.json cannot be written, the job goes on: {error}")
    return plan


def _keep_prediction(out: Path, plan: TrainPlan, prediction: Prediction) -> None:
    told: dict[str, Any] = {"plan": plan.fingerprint, "micro_batches": counts_of(plan)}
    told["prediction"] = asdict(prediction)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "predicted.json", json.dumps(told))


def keep_counts(job: Job) -> None:
    """Forget how micro-batches were shared out by steps that do not count for this run."""
    from mxn.train.run.checkpoint import manifest as manifests

    has_begun = bool(manifests.complete(Path(job.checkpoint.folder)))
    if not job.rebalances or job.checkpoint.resume == "never" or not has_begun:
        counts_log.forget(Path(job.out))


def micro_batches(out: Path, plan: str | None) -> dict[str, Any] | None:
    """Return how a job shares out its micro-batches now and as planned; None: as it was planned.

    `plan`: the fingerprint of the one that its ranks were started with.
    """
    changes = counts_log.read(out, plan)
    if not changes:
        return None
    return {
        "now": changes[-1].after,
        "since_step": changes[-1].step,
        "planned": changes[0].before,
        "changes": [asdict(change) for change in changes],
    }


def _steps_done(job: Job) -> int | None:
    """Return the steps of a job whose last one is in a checkpoint already, else None."""
    from mxn.train.run.checkpoint import manifest as manifests

    newest = max((step for step, _ in manifests.complete(Path(job.checkpoint.folder))), default=-1)
    is_done = job.steps is not None and newest >= job.steps and job.checkpoint.resume != "never"
    return job.steps if is_done else None


def keep_job(job: Job) -> None:
    """Write the job into its folder.

    Raises: UserError when the checkpoints there are of a job that learns something else: whoever
    exports them later must not find this job beside them.
    """
    if job.checkpoint.resume != "never":
        _check_checkpoints(job)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "job.json", job.to_json())


def _check_checkpoints(job: Job) -> None:
    from mxn.train.run.checkpoint import Stored
    from mxn.train.run.checkpoint import manifest as manifests
    from mxn.train.run.checkpoint.stored import check_job
    from mxn.train.run.from_job import settings_of

    found = manifests.complete(Path(job.checkpoint.folder))
    if not found:
        return
    folder = found[-1][1]
    try:
        manifest = manifests.read(folder)
    except manifests.BrokenError:
        return  # `find` says it, with what to do
    learns, _, rows = manifest.job.partition("-")
    if learns != job.fingerprint:  # a rank compares the rows as well, once it has them
        check_job(Stored(folder, manifest), f"{job.fingerprint}-{rows}", settings_of(job))


def kept_job(out: Path) -> Job:
    """Return the job that runs or ran in a folder. Raises: NotFoundError, ConfigError."""
    path = out / "job.json"
    try:
        return Job.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"no training job in {str(out)!r}: it holds no job.json",
            hint="name the `out` folder of a job, such as runs/shakespeare",
        ) from None
    except UserError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def predicted(out: Path) -> dict[str, Any] | None:
    """Return what the job's plan is predicted to do, or None before there is one."""
    path = out / "predicted.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def export(out: Path, target: Path, *, step: int | None = None, is_adapter: bool = False) -> int:
    """Write the model of a job's checkpoint as a Hugging Face folder; return the step it is of.

    `step` None: the newest. `is_adapter`: only the LoRA adapters, in PEFT's layout.
    Raises: NotFoundError without that checkpoint; BrokenError for one that was altered;
    UserError for an adapter of a job without one.
    """
    from mxn.train.run.checkpoint import Stored, with_checkpoint
    from mxn.train.run.export import export_adapter, export_model
    from mxn.train.run.from_job import open_source
    from mxn.train.run.lora import LoraSettings

    job = kept_job(out)
    if is_adapter and job.lora is None:
        raise UserError(f"job {job.name!r} trains no adapter", hint="leave --adapter out")
    source, lora = open_source(job), None
    if job.lora is not None:
        lora = LoraSettings(rank=job.lora.rank, alpha=job.lora.alpha, targets=job.lora.targets)

    def write(stored: Stored) -> int:
        def state_of(layer: int) -> dict[str, Any]:
            return _layer_state(source, stored, layer, lora, job.seed)

        if is_adapter and lora is not None:
            export_adapter(source, state_of, target, lora)
        else:
            export_model(source, state_of, target, lora=lora)
        return stored.manifest.position.step

    return with_checkpoint(Path(job.checkpoint.folder), step, write)


def _layer_state(source: Any, stored: Any, layer: int, lora: Any, seed: int) -> dict[str, Any]:
    """Return the weights of a layer: those of the source, with what was trained in their place."""
    from mxn.train.run.lora import attach
    from mxn.train.run.optim import AdamSettings, AdamW

    stage = source.stage(layer, layer + 1)
    if lora is not None:
        attach(stage, lora, seed=seed)
    optimizer = AdamW(stage, AdamSettings())
    optimizer.load_layer_state(layer, stored.layer(layer))
    return optimizer.master_state(layer)
