"""Makes answers final whose gateway is gone, by what this gateway sees itself. Blocking.

Whether a gateway is gone is told as for open rows of the ledger: it said so, its process does not
exist, or its heartbeat stands still on our own clock. Knows nothing of tasks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

import msgspec
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from mxn.ledger.database import Database
from mxn.ledger.keeper import Watch, is_dead
from mxn.ledger.schema import gateways
from mxn.ledger.tables_responses import responses
from mxn.serve.responses.types import Response, ResponseError

log = logging.getLogger("mxn.serve.responses")

LOST = "The server that made this answer ended before it was done; ask again."
_LOST_AFTER_S = 10.0
_LONGEST_GAP_S = 8.0  # between two looks; after a longer one nothing that was seen counts
_MAX_ROWS = 200  # made final in one transaction


class Abandoned:
    """Remembers how the heart of each gateway beat. For one thread at a time."""

    def __init__(
        self, database: Database, gateway_id: str, *, lost_after_s: float = _LOST_AFTER_S
    ) -> None:
        self._database = database
        self._gateway_id = gateway_id
        self._watch = Watch(lost_after_s, longest_gap_s=_LONGEST_GAP_S)
        self._strays: set[str] = set()
        self._missing: set[str] = set()  # at the last look
        self._taken: set[str] = set()  # at the one before

    def sweep(self, known: Collection[str]) -> set[str]:
        """Make answers `failed` that nobody works on; return those of `known` that are final or
        gone already: another gateway was asked to cancel or delete them.

        `known` are those under way here. Of our own others, and of those that are final, only what
        two looks in a row found counts, such as one that was written although the connection was
        lost: the one that begins or ends just now is in one place and not in the other.

        Raises: SQLAlchemyError; what was seen is forgotten, since nobody's heart could be seen.
        """
        try:
            self._end(self._gone(), self._look_at_own(set(known)))
        except SQLAlchemyError:
            self._watch.forget()
            raise
        return self._taken & self._missing

    def _gone(self) -> list[str]:
        query = (
            select(responses.c.owner, gateways)
            .select_from(responses)
            .outerjoin(gateways, gateways.c.id == responses.c.owner)
            .where(responses.c.owner.is_not(None), responses.c.owner != self._gateway_id)
            .distinct()
        )
        self._watch.begin_look(time.monotonic())
        with self._database.read() as connection:
            owners = list(connection.execute(query))
        at_s = time.monotonic()
        gone = [row.owner for row in owners if self._is_gone(row, at_s)]
        return gone if self._watch.end_look(time.monotonic()) else []

    def _is_gone(self, row: Any, at_s: float) -> bool:
        if row.id is not None and (row.state == "stopped" or is_dead(row.host, row.pid)):
            return True
        return self._watch.is_lost(row.owner, row.heartbeat_us, at_s)

    def _look_at_own(self, known: set[str]) -> list[str]:
        """Note which of ours are missing, and return those that nobody works on."""
        query = select(responses.c.id).where(responses.c.owner == self._gateway_id)
        with self._database.read() as connection:
            own = {row.id for row in connection.execute(query)}
        due, self._strays = (own - known) & self._strays, own - known
        self._taken, self._missing = self._missing, known - own
        return sorted(due)

    def _end(self, gone: list[str], strays: list[str]) -> None:
        if not gone and not strays:
            return
        under_way = responses.c.owner.in_(gone) | responses.c.id.in_(strays)
        query = (
            select(responses.c.id, responses.c.owner, responses.c.body)
            .where(responses.c.owner.is_not(None), under_way)
            .order_by(responses.c.id)
            .limit(_MAX_ROWS)
        )
        num = 0
        with self._database.begin() as connection:
            for row in connection.execute(query).all():
                one = (responses.c.id == row.id, responses.c.owner == row.owner)
                change = update(responses).where(*one).values(body=_failed(row.body), owner=None)
                num += connection.execute(change).rowcount
        if num:
            log.warning("%d answers were left by servers that are gone: failed", num)


def _failed(body: str) -> str:
    response = msgspec.json.decode(body, type=Response)
    response.status = "failed"
    response.error = ResponseError(code="server_error", message=LOST)
    return msgspec.json.encode(response).decode()
