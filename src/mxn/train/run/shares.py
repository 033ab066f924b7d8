"""Who does which micro-batches, as one rank of a running job sees it: it asks, tells and changes.

What decides is in `rebalance.py`, what is open in `open_batches.py`. Start at `Shares`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mxn.train.run import counts_log
from mxn.train.run.job import Job, metrics_path
from mxn.train.run.open_batches import can_be_open
from mxn.train.run.rank_step import RankStep, loads_of
from mxn.train.run.rebalance import Counts, Rebalancer, Since
from mxn.train.run.track import num_steps

if TYPE_CHECKING:
    from mxn.train.plan.plan import TrainPlan
    from mxn.train.run.bridge import Bridge
    from mxn.train.run.keeper import Keeper
    from mxn.train.run.trainer import RankTrainer

log = logging.getLogger("mxn.train")


def open_share_of(job: Job, plan: TrainPlan, *, is_first: bool) -> float:
    """Return the share of a step's micro-batches that nobody owns: 0 where the plan has no use.

    `is_first`: of all ranks, which says it if so.
    """
    share = job.rebalance.open_share if job.rebalances else 0.0
    if share > 0 and not can_be_open(plan):
        if is_first and len(plan.pipelines) > 1:  # a single one has nobody to share with
            log.warning(
                "open_share does nothing: it wants pipelines of one rank each, and 1f1b or gpipe"
            )
        return 0.0
    return share


class Shares:
    """The micro-batches of each pipeline: all ranks change them behind the same step."""

    def __init__(self, job: Job, trainer: RankTrainer, keeper: Keeper) -> None:
        """All ranks make theirs at the same time: the first one reads, and tells the others."""
        plan = trainer.placement.plan
        self._out, self._plan = Path(job.out), plan.fingerprint
        self._trainer, self._keeper = trainer, keeper
        self._rebalancer: Rebalancer | None = None
        if not job.rebalances or len(plan.pipelines) == 1:
            return
        known: list[Since] = []
        num_done = 0
        if trainer.bridge.rank == 0:
            known = counts_log.since(counts_log.read(self._out, self._plan), trainer.step)
            num_done = counts_log.begin(self._out, self._plan, num_steps(metrics_path(job)))
        num_done, recorded = _told(trainer.bridge, num_done, known, len(plan.pipelines))
        self._rebalancer = Rebalancer(
            plan, every_steps=job.rebalance.every_steps, least_gain=job.rebalance.least_gain,
            first_step=trainer.step, recorded=recorded, num_done=num_done,
        )  # fmt: skip
        self._use(self._rebalancer.counts)

    def look(self, told: RankStep) -> None:
        """Take what a step measured, and change what the next one does, if that pays."""
        if self._rebalancer is None:
            return
        loads = loads_of(self._trainer.placement, told)
        change = self._rebalancer.observe(told.log.step, loads, told.step_s)
        # Before the first step with it: whoever starts again behind that one must find it.
        if change is not None and self._trainer.bridge.rank == 0:
            log.info("%s", change.text())
            counts_log.append(self._out, self._plan, change)
        self._use(self._rebalancer.counts)

    def _use(self, counts: Counts) -> None:
        if counts != self._trainer.counts:
            self._trainer.set_counts(counts)
            self._keeper.use(self._trainer.placement.plan)


def _told(
    bridge: Bridge, num_done: int, known: list[Since], num_pipelines: int
) -> tuple[int, list[Since]]:
    """Return what rank 0 knows. Others do not read its files: a shared folder may be behind."""
    size = 1 + num_pipelines
    num_done, count = map(int, bridge.gather([float(num_done), float(len(known))])[0])
    mine = [float(number) for step, counts in known for number in (step, *counts)]
    flat = bridge.gather(mine or [0.0] * (count * size))[0] if count else []
    rows = [[int(number) for number in flat[at : at + size]] for at in range(0, len(flat), size)]
    return num_done, [(step, tuple(counts)) for step, *counts in rows]
