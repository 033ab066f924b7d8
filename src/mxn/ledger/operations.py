"""What the writer is asked to do: open a row, settle one, note progress. Values and no SQL."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from mxn.ledger.rules import Budget, Limit
from mxn.ledger.types import Receipt, Ticket

PeriodKey = tuple[str, int]  # budget or limit, and where its period or window starts


@dataclass(slots=True, eq=False)
class Opening:
    """A row to open. `limits` and `budgets` say what it must fit in, and how much it takes."""

    row: tuple[Any, ...]  # values of `sql.OPEN_COLUMNS`; the first is the id
    ticket: Ticket
    limits: tuple[tuple[Limit, int], ...]
    budgets: tuple[tuple[Budget, int, int], ...]  # budget, period start, amount
    window: int  # start of the minute it is counted in
    future: asyncio.Future[Any]
    deadline_s: float
    is_abandoned: bool = False  # nobody waits for it any more: closed again if it was written
    is_tried: bool = False  # an attempt was cut off, and may have written it
    outcome: Ticket | BaseException | None = None

    @property
    def id(self) -> str:
        return self.row[0]


@dataclass(slots=True, eq=False)
class Settling:
    """A row to close, and what that moves."""

    row: tuple[Any, ...]  # values of `sql.SETTLE_COLUMNS`
    id: str
    receipt: Receipt
    settled_us: int
    reason: str
    periods: tuple[tuple[PeriodKey, int, int], ...]  # budget period, released, spent
    windows: tuple[tuple[PeriodKey, int], ...]  # output tokens
    future: asyncio.Future[Any] | None
    outcome: Receipt | BaseException | None = None


@dataclass(slots=True)
class Batch:
    """What is written in one transaction."""

    openings: list[Opening] = field(default_factory=list)
    settlings: list[Settling] = field(default_factory=list)
    progress: list[tuple[Any, ...]] = field(default_factory=list)  # of `sql.PROGRESS_COLUMNS`

    def __bool__(self) -> bool:
        return bool(self.openings or self.settlings or self.progress)
