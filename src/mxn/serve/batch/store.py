"""Batches in the database: states, leases and lines. Blocking; call it from a thread.

A gateway works on a batch while it holds its lease; `fence` grows when the lease changes hands, and
every write of a worker names the fence it got, so a worker that was paused changes nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import case, delete, func, insert, select, update

from mxn.ledger.database import Database
from mxn.ledger.tables_batch import batch_lines, batches
from mxn.ledger.types import Principal
from mxn.serve.batch.line_store import OPEN, Held, LineStore
from mxn.serve.batch.standing import Over, why_over
from mxn.serve.batch.takeover import ACTIVE, Leases
from mxn.serve.batch.types import Batch, BatchError, BatchRequest
from mxn.serve.batch.view import batch_of

_US = 1_000_000
_WINDOW_S = 24 * 3600


def now_us() -> int:
    return time.time_ns() // 1000


def _lease_end_us(lease_s: float) -> int:
    """Return a time for people to read; gateways only see that it moves."""
    return now_us() + int(lease_s * _US)


class BatchStore(LineStore):
    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._leases = Leases(database)

    def create(self, request: BatchRequest, owner: Principal) -> Batch:
        now = now_us()
        expires = request.output_expires_after
        row = {
            "id": f"batch_{uuid.uuid4().hex}",
            "org_id": owner.org_id,
            "project_id": owner.project_id,
            "key_id": owner.key_id,
            "user_id": owner.user_id,
            "principal": msgspec.json.encode(owner).decode(),
            "endpoint": request.endpoint,
            "status": "validating",
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "metadata": msgspec.json.encode(request.metadata).decode(),
            "output_expires_s": expires.seconds if expires else None,
            "created_us": now,
            "expires_us": now + _WINDOW_S * _US,
        }
        with self._database.begin() as connection:
            connection.execute(insert(batches).values(**row))
        found = self.get(row["id"], owner.project_id)
        assert found is not None
        return found

    def get(self, batch_id: str, project_id: str) -> Batch | None:
        query = select(batches).where(batches.c.id == batch_id, batches.c.project_id == project_id)
        with self._database.read() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            return batch_of(connection, row._mapping)

    def page(
        self, project_id: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[Batch], bool]:
        """Return a page, the newest first, and whether there is more."""
        query = select(batches.c.id).where(batches.c.project_id == project_id)
        if after is not None:
            at = select(batches.c.created_us).where(batches.c.id == after).scalar_subquery()
            query = query.where(batches.c.created_us < at)
        query = query.order_by(batches.c.created_us.desc()).limit(limit + 1)
        with self._database.read() as connection:
            ids = list(connection.execute(query).scalars())
        found = [self.get(batch_id, project_id) for batch_id in ids[:limit]]
        return [batch for batch in found if batch is not None], len(ids) > limit

    def ask_to_cancel(self, batch_id: str, project_id: str) -> bool:
        """Note that nothing more of a batch shall start; False if it has ended already."""
        with self._database.begin() as connection:
            change = (
                update(batches)
                .where(
                    batches.c.id == batch_id,
                    batches.c.project_id == project_id,
                    batches.c.status.in_(("validating", "in_progress")),
                )
                .values(status="cancelling", cancelling_us=now_us())
            )
            return connection.execute(change).rowcount == 1

    def claim(
        self,
        gateway_id: str,
        lease_s: float,
        busy: Mapping[str, int] | None = None,
        most: int = 1,
    ) -> Held | None:
        """Take the oldest batch that nobody works on, of the project that has the fewest.

        `busy` says how many of each project this gateway works on; one with `most` gets no more.
        """
        counts = busy or {}
        places = [
            (counts.get(row.project_id, 0), row.created_us, row.id, row)
            for row in self._leases.free(lease_s)
            if counts.get(row.project_id, 0) < most
        ]
        if not places:
            return None
        free = min(places)[3]
        with self._database.begin() as connection:
            take = (
                update(batches)
                .where(
                    batches.c.id == free.id,
                    batches.c.fence == free.fence,
                    batches.c.lease_us == free.lease_us,
                    batches.c.status.in_(ACTIVE),
                )
                .values(owner=gateway_id, lease_us=_lease_end_us(lease_s), fence=free.fence + 1)
            )
            if connection.execute(take).rowcount != 1:
                return None  # another gateway was faster, or its owner came back
            row = connection.execute(select(batches).where(batches.c.id == free.id)).one()
        return Held(
            id=row.id,
            fence=row.fence,
            principal=msgspec.json.decode(row.principal, type=Principal),
            endpoint=row.endpoint,
            status=row.status,
            input_file_id=row.input_file_id,
            output_expires_s=row.output_expires_s,
            expires_us=row.expires_us,
            is_expired=row.expired_us is not None,
            has_lines=row.in_progress_us is not None,
        )

    def renew(self, held: Held, lease_s: float) -> str | None:
        """Keep a batch; return its status, or None when it is another gateway's now.

        A batch whose key is over is cancelled.
        """
        if not self._update(held, lease_us=_lease_end_us(lease_s)):
            return None
        if self.why_over(held) is not None:
            self.ask_to_cancel(held.id, held.principal.project_id)
        with self._database.read() as connection:
            query = select(batches.c.status, batches.c.cancelling_us)
            row = connection.execute(query.where(batches.c.id == held.id)).one()
        # One that was cancelled stays so while its files are written.
        return "cancelling" if row.cancelling_us is not None else row.status

    def why_over(self, held: Held) -> Over | None:
        """Return why the key that made a batch may not go on with it; None when it may."""
        query = select(batches.c.model).where(batches.c.id == held.id)
        with self._database.read() as connection:
            model = connection.execute(query).scalar()
            return why_over(connection, held.principal, model, now_us())

    def release(self, held: Held) -> None:
        self._update(held, lease_us=0, owner=None)

    def fail(self, held: Held, errors: list[BatchError]) -> None:
        body = msgspec.json.encode(errors).decode()
        self._update(held, status="failed", failed_us=now_us(), errors=body, lease_us=0)

    def begin(self, held: Held, model: str | None, lines: list[tuple[str, str]]) -> bool:
        """Enter the checked lines and go to `in_progress`, unless it was cancelled meanwhile; False
        when it is another gateway's."""
        rows = [
            {"batch_id": held.id, "line": at, "custom_id": custom_id, "body": body,
             "state": "pending"}
            for at, (custom_id, body) in enumerate(lines, start=1)
        ]  # fmt: skip
        step = 500  # rows in one transaction: every request waits for the write lock
        for start in range(0, len(rows), step):
            end = start + step
            with self._database.begin() as connection:
                if not self.lock(connection, held):
                    return False
                connection.execute(  # of a gateway that died while it entered them
                    delete(batch_lines).where(
                        batch_lines.c.batch_id == held.id,
                        batch_lines.c.line > start,
                        batch_lines.c.line <= end,
                    )
                )
                connection.execute(insert(batch_lines), rows[start:end])
        values = {"in_progress_us": now_us(), "model": model, "total": len(rows)}
        is_new = batches.c.status == "validating"
        return self._update(
            held, status=case((is_new, "in_progress"), else_=batches.c.status), **values
        )

    def to_finalizing(self, held: Held) -> bool:
        """Begin to write the files; False while a line has no result, or when the batch is another
        gateway's."""
        with self._database.begin() as connection:
            if not self.lock(connection, held):
                return False
            left = select(func.count()).where(
                batch_lines.c.batch_id == held.id, batch_lines.c.state.in_(OPEN)
            )
            if connection.execute(left).scalar_one():
                return False
            change = update(batches).where(batches.c.id == held.id)
            connection.execute(change.values(status="finalizing", finalizing_us=now_us()))
        return True

    def finish(
        self, held: Held, status: str, output_file_id: str | None, error_file_id: str | None
    ) -> bool:
        """Enter the files and the last status."""
        return self._update(
            held,
            status=status,
            output_file_id=output_file_id,
            error_file_id=error_file_id,
            lease_us=0,
            **{f"{status}_us": now_us()},
        )

    def _update(self, held: Held, **values: Any) -> bool:
        with self._database.begin() as connection:
            change = (
                update(batches)
                .where(batches.c.id == held.id, batches.c.fence == held.fence)
                .values(**values)
            )
            return connection.execute(change).rowcount == 1
