"""The lines of a batch in the database: which are left, their attempts, their results. Blocking.

Every write names the fence of who holds the batch, see `store`.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, select, update

from mxn.ledger.database import Database
from mxn.ledger.schema import usage
from mxn.ledger.tables_batch import batch_lines, batches
from mxn.ledger.types import Principal

OPEN = ("pending", "running")  # lines that have no result yet
Attempt = Literal["unknown", "open", "paid", "unpaid"]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that this gateway may work on, until the lease ends or is renewed."""

    id: str
    fence: int
    principal: Principal
    endpoint: str
    status: str
    input_file_id: str
    output_expires_s: int | None
    expires_us: int
    is_expired: bool  # some lines got no answer because their time was over
    has_lines: bool  # its file was checked, and its lines are in the database


class Line(msgspec.Struct, frozen=True, kw_only=True):
    line: int
    custom_id: str
    body: str
    usage_id: str | None  # of an attempt that was under way when its gateway died


class LineStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def next_lines(self, held: Held, after: int, limit: int) -> list[Line]:
        """Return lines that are not done, in order, beginning behind line `after`."""
        columns = (batch_lines.c.line, batch_lines.c.custom_id, batch_lines.c.body,
                   batch_lines.c.usage_id)  # fmt: skip
        query = (
            select(*columns)
            .where(
                batch_lines.c.batch_id == held.id,
                batch_lines.c.line > after,
                batch_lines.c.state.in_(OPEN),
            )
            .order_by(batch_lines.c.line)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                Line(line=row.line, custom_id=row.custom_id, body=row.body, usage_id=row.usage_id)
                for row in connection.execute(query)
            ]

    def state_of(self, usage_id: str) -> Attempt:
        """Return what became of an earlier attempt at a line."""
        query = select(usage.c.state, usage.c.reason).where(usage.c.id == usage_id)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return "unknown"
        if row.state != "settled":
            return "open"
        return "paid" if row.reason == "complete" else "unpaid"

    def start_line(self, held: Held, line: int, usage_id: str) -> bool:
        """Note the attempt before it begins. False when the batch is another gateway's."""
        return self._set_line(held, line, state="running", usage_id=usage_id)

    def end_line(self, held: Held, line: int, state: str, result: str) -> bool:
        return self._set_line(held, line, state=state, result=result)

    def fail_rest(
        self, held: Held, results: list[tuple[int, str]], *, is_expired: bool = False
    ) -> bool:
        """Give lines that are not done a result; False when the batch is another gateway's."""
        with self._database.begin() as connection:
            if not self.lock(connection, held):
                return False
            for line, result in results:
                change = update(batch_lines).where(
                    batch_lines.c.batch_id == held.id,
                    batch_lines.c.line == line,
                    batch_lines.c.state.in_(OPEN),
                )
                connection.execute(change.values(state="failed", result=result))
            if is_expired:
                mine = update(batches).where(batches.c.id == held.id)
                connection.execute(mine.values(expired_us=time.time_ns() // 1000))
        return True

    def results(self, held: Held, state: str, after: int, limit: int) -> list[tuple[int, str]]:
        query = (
            select(batch_lines.c.line, batch_lines.c.result)
            .where(
                batch_lines.c.batch_id == held.id,
                batch_lines.c.line > after,
                batch_lines.c.state == state,
            )
            .order_by(batch_lines.c.line)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [(row.line, row.result) for row in connection.execute(query)]

    @staticmethod
    def lock(connection: Connection, held: Held) -> bool:
        """Keep others from taking a batch until the transaction ends; False when one has it."""
        mine = update(batches).where(batches.c.id == held.id, batches.c.fence == held.fence)
        return connection.execute(mine.values(fence=held.fence)).rowcount == 1

    def _set_line(self, held: Held, line: int, **values: Any) -> bool:
        is_mine = (
            select(batches.c.id)
            .where(batches.c.id == held.id, batches.c.fence == held.fence)
            .exists()
        )
        with self._database.begin() as connection:
            change = (
                update(batch_lines)
                .where(batch_lines.c.batch_id == held.id, batch_lines.c.line == line, is_mine)
                .values(**values)
            )
            return connection.execute(change).rowcount == 1
