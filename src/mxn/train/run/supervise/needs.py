"""What a supervisor is given: planner, gate, launcher, probe, and what those may raise.

Knows no processes and no decisions. Start at `MakePlan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mxn.errors import CapacityError, MxnError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run.job import Job
from mxn.train.run.supervise import words as w
from mxn.train.run.supervise.ranks import Launching, Ranks


class GateError(MxnError):
    """A chip does not compute what it must; the message names operator, chip, error and budget."""


class SpeedError(MxnError):
    """A chip is not as fast as its profile says; what was measured is stored."""

    def __init__(self, message: str, *, chip: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.chip = chip


class NoPlaceError(CapacityError):
    """Ranks have no place to run now, as a machine is gone or busy; later there may be one.

    `group`: whose rank has none, None where nobody knows.
    """

    def __init__(self, message: str, *, group: str | None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.group = group


class Probe(Protocol):
    """A check of a group's device that runs beside the job."""

    def answer(self) -> bool | None:
        """True: it computes; False: it does not; None: not known yet."""
        ...


MakePlan = Callable[[Job, tuple[str, ...]], TrainPlan]
RunGate = Callable[[Job, TrainPlan], None]
Launch = Callable[[Launching], Ranks]
StartProbe = Callable[[Job, str], Probe]


def policy_of(job: Job) -> w.Policy:
    faults = job.faults
    return w.Policy(
        max_restarts=faults.max_restarts,
        backoff_s=faults.backoff_s,
        max_backoff_s=faults.max_backoff_s,
        drop_after=faults.drop_after,
        grow=faults.grow,
        grow_every_s=faults.grow_every_s,
        replans_on_lie=job.gate.speed == "replan",
    )
