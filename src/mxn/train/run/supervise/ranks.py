"""What a supervisor needs of the processes of a job, and how it finds who is to blame.

Knows no decisions. Whoever starts ranks (`launch.py`) gives a `Ranks`. Start at `culprit`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mxn.train.plan.plan import TrainPlan
from mxn.train.run.control import Control, LastWords
from mxn.train.run.job import Job
from mxn.train.run.supervise.words import RankDied


@dataclass(frozen=True, slots=True, kw_only=True)
class Launching:
    """All that ranks are started with."""

    job: Job
    plan: TrainPlan
    launch: int
    resume_step: int | None  # of the checkpoint to go on from; None: begin
    log_folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A rank that ended and did not end well. `code` as subprocess gives it: below 0, a signal."""

    rank: int
    group: str
    code: int
    words: LastWords | None = None


class Ranks(Protocol):
    """The processes of one launch."""

    def deaths(self) -> list[Death]:
        """Return the ranks that ended badly so far; words may be None."""
        ...

    def have_ended(self) -> bool:
        """Whether no rank runs any more."""
        ...

    def kill(self) -> None:
        """End all ranks at once, and return when they are gone."""
        ...


# Who is blamed first: a rank that lost another one says less than one that was killed.
_ORDER = ("signal", "chip", "other", "user", "peer")


def culprit(deaths: list[Death]) -> RankDied:
    """Return the death that explains the others."""
    first = min(deaths, key=lambda death: (_ORDER.index(_kind(death)), death.rank))
    kind = _kind(first)
    return RankDied(
        group=None if kind == "peer" else first.group,
        reason=_reason(first),
        is_users=kind == "user",
    )


def with_words(death: Death, control: Control) -> Death:
    """Return a death with what the rank left in the job's folder, where it could."""
    return death if death.words else replace(death, words=control.words_of(death.rank))


def _kind(death: Death) -> str:
    if death.words is not None:
        return death.words.kind
    return "signal" if death.code < 0 else "other"


def _reason(death: Death) -> str:
    who = f"rank {death.rank} (group {death.group!r})"
    if death.words is not None:
        return f"{who}: {death.words.message}"
    if death.code < 0:
        return f"{who} was killed by signal {-death.code}"
    return f"{who} ended with status {death.code}"
