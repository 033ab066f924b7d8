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

    def sweep(self, known: Collection[str]) -> int:
        """Make answers `failed` that nobody works on; return how many.

        `known` are those under way here; of our own others only what two looks in a row found, such
        as one that was written although the connection was lost. Raises: SQLAlchemyError; what was
        seen is forgotten, since nobody's heart could be seen to beat.
        """
        try:
            return self._end(self._gone(), self._own_strays(known))
        except SQLAlchemyError:
            self._watch.forget()
            raise

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

    def _own_strays(self, known: Collection[str]) -> list[str]:
        query = select(responses.c.id).where(responses.c.owner == self._gateway_id)
        with self._database.read() as connection:
            found = {row.id for row in connection.execute(query)} - set(known)
        due, self._strays = found & self._strays, found
        return sorted(due)

    def _end(self, gone: list[str], strays: list[str]) -> int:
        if not gone and not strays:
            return 0
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
        return num


def _failed(body: str) -> str:
    response = msgspec.json.decode(body, type=Response)
    response.status = "failed"
    response.error = ResponseError(code="server_error", message=LOST)
    return msgspec.json.encode(response).decode()
