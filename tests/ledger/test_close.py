"""The end of a gateway's ledger: what can be written is written, and it ends in any case."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from mxn.errors import OverloadedError
from mxn.ledger.database import Database
from mxn.ledger.sql_ledger import SqlLedger
from mxn.serve import accounting
from mxn.serve.accounting import Accounting
from support.ledgers import complete, make_tenant, row_of
from support.postgres import Postgres, find_binaries


def test_progress_that_was_noted_last_is_written(database, tenant):
    async def scenario():
        ledger = SqlLedger(database, progress_s=60)
        ticket = await ledger.open(tenant.usage())
        await asyncio.sleep(0.3)  # so that the first progress has been due
        ledger.progress(ticket, 10, 3, chip="cpu")
        await asyncio.sleep(0.3)
        ledger.progress(ticket, 10, 7, chip="cpu")
        await ledger.close()
        return ticket.usage.usage_id

    row = row_of(database, asyncio.run(scenario()))
    assert (row.state, row.output_tokens) == ("open", 7)


def test_progress_of_a_row_that_is_settled_meanwhile_changes_nothing(database, tenant):
    async def scenario():
        ledger = SqlLedger(database, progress_s=60)
        ticket = await ledger.open(tenant.usage())
        ledger.progress(ticket, 10, 3, chip="cpu")
        settling = asyncio.create_task(ledger.settle(ticket, complete(10, 5)))
        await asyncio.sleep(0)
        await ledger.close()
        await settling
        return ticket.usage.usage_id

    row = row_of(database, asyncio.run(scenario()))
    assert (row.state, row.output_tokens, row.reason) == ("settled", 5, "complete")


@pytest.fixture
def own_postgres():
    """A server that a test may stop."""
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    server = Postgres()
    server.start()
    pids = []
    try:
        yield server, pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        server.remove()


def freeze(server: Postgres, pids: list[int]) -> None:
    """Stop all its processes, as on a machine that hangs: connections stay, answers do not come."""
    first = int((server.data / "postmaster.pid").read_text().splitlines()[0])
    for process in (psutil.Process(first), *psutil.Process(first).children(recursive=True)):
        pids.append(process.pid)
        process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_server_ends_although_its_database_does_not_answer(
    own_postgres, monkeypatch, caplog, how
):
    server, pids = own_postgres
    database = Database.open(server.url)
    tenant = make_tenant(database)
    database.close()
    monkeypatch.setattr(accounting, "_CLOSE_S", 0.5)
    monkeypatch.setattr("mxn.ledger.sql_ledger._GOODBYE_S", 0.5)

    async def scenario():
        books = Accounting(Database(server.url))
        ledger = await books.start()
        ticket = await ledger.open(tenant.usage())
        if how == "ends":
            server.stop("immediate")
        else:
            freeze(server, pids)
        settling = asyncio.create_task(ledger.settle(ticket, complete(10, 5)))
        await asyncio.sleep(0.1)
        begun_s = time.monotonic()
        await books.close()
        assert time.monotonic() - begun_s < 5
        with pytest.raises(OverloadedError, match="not written"):
            await settling

    begun_s = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - begun_s < 15  # no thread keeps the event loop from its end
    assert "1 settlements are not written" in caplog.text
