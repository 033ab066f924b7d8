"""What the planner needs for a job, or for a model and a cluster that nobody has: a `Task`.

A job's devices are measured or found in the store; a cluster file's chips are derived from their
data sheets (`from_cluster.py`). Both end in the same values, so `search` and `predict` do not know
which it was. Start at `task_of_job`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mxn.errors import CapacityError, ConfigError, NotFoundError, UserError
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.prediction import Prediction
from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.search.choices import Found, Limits
from mxn.train.plan.shape import ModelShape
from mxn.train.run.open_batches import can_be_open, likely
from mxn.train.run.rebalance import counts_of, with_counts
from mxn.units import format_bytes

if TYPE_CHECKING:
    from mxn.train.plan.bounds import Bounds
    from mxn.train.plan.explain import Explanation
    from mxn.train.plan.simulate import Simulation
    from mxn.train.run.job import Job
    from mxn.train.run.measure import Measured

log = logging.getLogger("mxn.train")

_WORTH_OPEN = 1.1  # times the predicted step: what open micro-batches may save of waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, a batch, a pool and what its chips cost: all that a plan is made from."""

    shape: ModelShape
    rows: int  # of a step
    cluster: Cluster
    profiles: dict[str, ChipProfile]
    memory: MemoryModel
    limits: Limits
    notes: tuple[str, ...] = ()  # what was assumed
    measured: Measured | None = None  # None: derived from data sheets
    open_share: float = 0.0  # of micro-batches, if pipelines are of one rank each

    def search(self) -> Found:
        """Return the best plan. Raises: CapacityError, with what is there, when none fits."""
        try:
            best = self._search(self.limits)
        except CapacityError as error:
            message = "\n  ".join([error.message, *self._needs()])
            raise CapacityError(message, hint=error.hint) from error
        if not self.open_share or can_be_open(best.best.plan):
            return best
        try:
            flat = self._search(replace(self.limits, max_stages=1, tps=(1,)))
        except CapacityError:
            log.warning("open_share does nothing: no chip holds the whole model alone")
            return best
        if not can_be_open(flat.best.plan):
            log.warning("open_share does nothing: no two chips hold the whole model each")
            return best
        slower = flat.best.prediction.iteration_s / best.best.prediction.iteration_s
        if slower > _WORTH_OPEN:
            log.warning(
                "open_share does nothing: with pipelines of one rank each a step is predicted to "
                "take %.2f times as long",
                slower,
            )
            return best
        return flat

    def _search(self, limits: Limits) -> Found:
        from mxn.train.plan.search.planner import search

        return search(
            self.shape, self.rows, self.cluster, self.profiles, memory=self.memory, limits=limits
        )

    def _needs(self) -> Iterator[str]:
        """Say what the model takes, and what each group has for it."""
        held = self.shape.params * self.memory.state_bytes
        yield (
            f"weights, gradients and optimizer of {self.shape.params / 1e6:,.1f} M parameters take "
            f"{format_bytes(held)} together"
        )
        for group in self.cluster.groups:
            taken = self.profiles[group.chip].framework_bytes
            yield (
                f"group {group.name!r}: {group.num_devices} x {format_bytes(group.memory_bytes)}, "
                f"of which {format_bytes(taken)} go to a process before any weight"
            )

    def predict(self, plan: TrainPlan) -> Prediction:
        """Return what a step of `plan` takes, its open micro-batches done by who gets to them."""
        found = self._predict(plan)
        if not self.open_share or not can_be_open(plan):
            return found
        counts = counts_of(plan)
        busy_s = [stage.busy_s for stage in found.stages]
        each_s = [seconds / count for seconds, count in zip(busy_s, counts, strict=True)]
        return self._predict(with_counts(plan, likely(counts, self.open_share, each_s)))

    def _predict(self, plan: TrainPlan) -> Prediction:
        return predict(plan, self.shape, self.cluster, self.profiles, memory=self.memory)

    def bounds(self) -> Bounds:
        """Return how fast this pool could be at most."""
        from mxn.train.plan.bounds import bounds

        return bounds(
            self.shape, self.rows, self.cluster, self.profiles, memory=self.memory,
            limits=self.limits,
        )  # fmt: skip

    def explain(self, found: Found, bounds: Bounds) -> Explanation:
        """Return why the best plan is the best."""
        from mxn.train.plan.explain import explain

        return explain(found, self.shape, self.cluster, self.profiles, bounds, memory=self.memory)

    def simulate(self, plan: TrainPlan) -> Simulation:
        """Return a step of `plan`, pass by pass."""
        from mxn.train.plan.simulate import simulate_plan

        return simulate_plan(plan, self.shape, self.cluster, self.profiles, memory=self.memory)


def task_of_job(
    job: Job,
    *,
    groups: Sequence[str] | None = None,
    fresh: bool = False,
    on_progress: Callable[[str], None] = log.info,
) -> Task:
    """Return the task of a job on the named groups (None: all), measuring what is not stored.

    Raises: what `measure` raises; UserError for a group that the job does not have.
    """
    from mxn.train.run.measure import measure
    from mxn.train.run.widths import promising_widths

    job = with_devices(job)
    if groups is not None:
        kept = tuple(job.group(name) for name in groups)
        job = replace(job, devices=kept)
    measured = measure(job, tps=sorted(widths_of(job)), fresh=fresh, on_progress=on_progress)
    limits = limits_of(job)
    if job.plan.file is None and (widths := promising_widths(job, measured, limits)):
        on_progress(f"tensor parallelism of {', '.join(map(str, widths))} might pay")
        measured = measure(job, tps=widths, on_progress=on_progress)
        limits = replace(limits, tps=(1, *widths))
    return Task(
        shape=measured.shape,
        rows=job.global_batch,
        cluster=measured.cluster,
        profiles=measured.profiles,
        memory=measured.memory,
        limits=limits,
        measured=measured,
        open_share=job.rebalance.open_share if job.rebalances else 0.0,
    )


def widths_of(job: Job) -> list[int]:
    """Return the widths of tensor parallelism that the job's plan file has.

    Raises: NotFoundError, ConfigError as `read_plan`.
    """
    if job.plan.file is None:
        return []
    plan = read_plan(Path(job.plan.file))
    return sorted({stage.tp for pipeline in plan.pipelines for stage in pipeline.stages})


def limits_of(job: Job) -> Limits:
    """Return what the planner may choose for a job: what the runner does and the job allows.

    Tensor parallelism is 1 here; `widths.promising_widths` says which others to measure.
    """
    plan, free = job.plan, Limits()
    return Limits(
        micro_batches=(job.micro_batch,),
        tps=(1,),
        schedules=(plan.schedule,) if plan.schedule else free.schedules,
        recompute=(plan.recompute,) if plan.recompute else free.recompute,
        max_stages=plan.max_depth,
        max_expert_parallel=1,
    )


def plan_of_job(job: Job, task: Task) -> tuple[TrainPlan, Prediction, Found | None]:
    """Return the plan of a job: the one in its file, or the best that is found.

    Raises: UserError for a plan file of another model, batch or pool.
    """
    if job.plan.file is None:
        found = task.search()
        return found.best.plan, found.best.prediction, found
    plan = read_plan(Path(job.plan.file))
    rows = plan.micro_batches * plan.micro_batch
    # Data comes in the job's micro-batches, so one of another size would fit no message.
    if (rows, plan.micro_batch) != (job.global_batch, job.micro_batch):
        raise UserError(
            f"{job.plan.file} is for steps of {rows} rows in micro-batches of {plan.micro_batch}, "
            f"the job has {job.global_batch} in {job.micro_batch}",
            hint="make a plan for this job: `mxn train plan JOB --out FILE`",
        )
    return plan, task.predict(plan), None


def read_plan(path: Path) -> TrainPlan:
    """Raises: NotFoundError, UserError for a file that is no plan."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"no plan file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        return TrainPlan.from_json(text)
    except UserError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def with_devices(job: Job) -> Job:
    """Return the job with groups of the real devices here (`groups_of`), if it names none."""
    from mxn.chips import survey
    from mxn.chips.registry import chip_of
    from mxn.train.run.job_devices import groups_of

    if job.devices:
        return job
    real = [d for d in survey().devices if chip_of(d.vendor).basis != "simulated"]
    accelerators = [d for d in real if d.torch_device != "cpu"]
    groups = groups_of(accelerators or real)
    log.info("devices auto: %s", ", ".join(f"{g.count} x {g.name}" for g in groups))
    return replace(job, devices=groups)
