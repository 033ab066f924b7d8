"""The database of a server: its ledger, its files, batches and answers, from start to end."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from mxn.errors import OverloadedError
from mxn.ledger.types import Ledger
from mxn.serve.context import RequestContext
from mxn.serve.stores import Stores

if TYPE_CHECKING:
    from mxn.ledger.database import Database
    from mxn.ledger.sql_ledger import SqlLedger
    from mxn.serve.batch.worker import Answer

log = logging.getLogger("mxn.serve")

_CLOSE_S = 10.0  # for settlements at the end, after those who wait for theirs had as long


def new_gateway_id() -> str:
    """Return an id that no other gateway has, and that tells a person where it ran."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Accounting:
    """Opens what needs the database when the server starts, and closes it last."""

    def __init__(self, database: Database, *, gateway_id: str | None = None) -> None:
        self.database = database
        self.gateway_id = gateway_id or new_gateway_id()
        self._ledger: SqlLedger | None = None

    def stores(self, app: Callable[[], ASGIApp]) -> Stores:
        """Return the stores; `app` gives the application that runs the lines of batches."""

        async def call(path: str, body: bytes, context: RequestContext) -> Answer:
            from mxn.serve.inner import caller

            return await caller(app())(path, body, context)

        return Stores.on(self.database, call, gateway_id=self.gateway_id)

    async def start(self) -> Ledger:
        from mxn.ledger.sql_ledger import SqlLedger

        self._ledger = SqlLedger(
            self.database, gateway_id=self.gateway_id, close_timeout_s=_CLOSE_S
        )
        await self._ledger.start()
        return self._ledger

    async def close(self) -> None:
        """Write what is pending and close the database, within limits when it is away.

        What could not be written is logged: its rows stay open until a gateway sweeps them.
        """
        try:
            if self._ledger is not None:
                await self._ledger.close()
        except OverloadedError as error:
            log.error("%s (%s)", error, error.hint)
        finally:
            self.database.close()
