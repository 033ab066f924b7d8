"""The words of supervision: states, events, orders. Values only; `decide.py` connects them.

Phases:

    planning    a plan for the groups that are left is being made
    checking    the parity gate runs on that plan
    running     ranks run
    pausing     ranks were asked to write a checkpoint and end, for another plan
    backing_off ranks died; they are started again at `resume_at_s`
    starved     what is left cannot hold the job; it waits for a dropped group to answer
    stopping    ranks were asked to write a last checkpoint and end, for good
    done, stopped, failed    nothing more happens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal[
    "planning", "checking", "running", "pausing", "backing_off", "starved", "stopping",
    "done", "stopped", "failed",
]  # fmt: skip
FINAL = frozenset({"done", "stopped", "failed"})
WITH_RANKS = frozenset({"running", "pausing", "stopping"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    max_restarts: int = 10
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    drop_after: int = 3
    grow: bool = True
    grow_every_s: float = 30.0
    replans_on_lie: bool = True  # else a chip that lies about its speed ends the job


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    reason: str
    back_after_s: float  # an answer before this time is not believed


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    groups: tuple[str, ...]  # of the job
    phase: Phase = "planning"
    dropped: Mapping[str, Dropped] = field(default_factory=dict)
    launch: int = 0  # how often ranks were started
    restarts: int = 0  # without a new checkpoint in between
    failures: Mapping[str, int] = field(default_factory=dict)  # of a group, likewise
    drops: Mapping[str, int] = field(default_factory=dict)  # how often a group was dropped
    regrown: tuple[str, ...] = ()  # taken back since ranks last ran: no plan with them has worked
    checkpoint_step: int = -1  # the newest complete one
    resume_at_s: float = 0.0
    lies: frozenset[str] = frozenset()  # chips that the job was planned again for
    reason: str = ""  # why it is in this phase

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(group for group in self.groups if group not in self.dropped)

    def validate(self) -> None:
        """What holds in every state; tests call it after each step."""
        assert self.active, "a job has at least one group"
        assert set(self.dropped) <= set(self.groups)
        assert set(self.regrown) <= set(self.active)
        assert min([self.restarts, self.launch, *self.failures.values()]) >= 0


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    groups: tuple[str, ...]  # a plan for others than the active ones is out of date


@dataclass(frozen=True, slots=True)
class PlanFailed:
    groups: tuple[str, ...]  # as of a plan: for others than the active ones it is out of date
    reason: str
    is_capacity: bool  # the groups are too small, which another group may change


@dataclass(frozen=True, slots=True)
class GatePassed:
    pass


@dataclass(frozen=True, slots=True)
class GateFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class SpeedOff:
    """Measured times differ from those that were planned with; the measured ones are stored."""

    chip: str
    reason: str


@dataclass(frozen=True, slots=True)
class RankDied:
    """The first rank that went, not those that lost it. `group` None: nobody knows whose fault."""

    group: str | None
    reason: str
    is_users: bool = False  # wrong input: trying again cannot help


@dataclass(frozen=True, slots=True)
class RanksEnded:
    """All ranks ended well."""

    is_finished: bool  # the last step of the job is done


@dataclass(frozen=True, slots=True)
class Saved:
    step: int


@dataclass(frozen=True, slots=True)
class DropAsked:
    group: str
    reason: str = "asked for"


@dataclass(frozen=True, slots=True)
class GrowAsked:
    group: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The device of a dropped group passed a probe."""

    group: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    pass


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    Planned | PlanFailed | GatePassed | GateFailed | SpeedOff | RankDied | RanksEnded | Saved
    | DropAsked | GrowAsked | Answered | StopAsked | Tick
)  # fmt: skip


# -- orders ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakePlan:
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunGate:
    pass


@dataclass(frozen=True, slots=True)
class Launch:
    number: int


@dataclass(frozen=True, slots=True)
class PauseRanks:
    """Ask all ranks to write a checkpoint behind this step and to end."""


@dataclass(frozen=True, slots=True)
class KillRanks:
    pass


@dataclass(frozen=True, slots=True)
class Say:
    text: str


Order = MakePlan | RunGate | Launch | PauseRanks | KillRanks | Say
