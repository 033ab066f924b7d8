"""Which batches nobody works on, by what this gateway sees itself. Blocking.

Clocks of different machines are never compared: a lease is over when it was given back, when its
gateway is known to be gone, or when it has stood still for its length on our own steady clock. Its
owner, who renews it every second, counts the same length from before its last renewal, and so stops
before anybody else begins.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Row, select
from sqlalchemy.exc import SQLAlchemyError

from mxn.ledger.database import Database
from mxn.ledger.keeper import is_dead
from mxn.ledger.schema import gateways
from mxn.ledger.tables_batch import batches

ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")


class Leases:
    """Remembers how each lease stood when it was last seen to move. For one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def free(self, lease_s: float) -> list[Any]:
        """Return id, project, times and fence of batches to take up, the oldest first.

        Raises: SQLAlchemyError; what was seen is forgotten, since nobody could renew meanwhile.
        """
        try:
            with self._database.read() as connection:
                rows = self._rows(connection)
        except SQLAlchemyError:
            self._seen.clear()
            raise
        at_s = time.monotonic()
        found = [row for row in rows if self._is_over(row, lease_s, at_s)]
        present = {row.id for row in rows}
        self._seen = {name: seen for name, seen in self._seen.items() if name in present}
        return found

    @staticmethod
    def _rows(connection: Connection) -> list[Any]:
        query = (
            select(
                batches.c.id,
                batches.c.project_id,
                batches.c.created_us,
                batches.c.fence,
                batches.c.lease_us,
                gateways.c.state,
                gateways.c.host,
                gateways.c.pid,
            )
            .select_from(batches)
            .outerjoin(gateways, gateways.c.id == batches.c.owner)
            .where(batches.c.status.in_(ACTIVE))
            .order_by(batches.c.created_us)
        )
        return list(connection.execute(query))

    def _is_over(self, row: Row[Any], lease_s: float, at_s: float) -> bool:
        if row.lease_us == 0 or row.state == "stopped":
            return True
        if row.state is not None and is_dead(row.host, row.pid):
            return True
        mark = (row.fence, row.lease_us)
        known = self._seen.get(row.id)
        if known is None or known[0] != mark:
            self._seen[row.id] = (mark, at_s)
            return False
        return at_s - known[1] >= lease_s
