"""Several gateways on one database: exact limits, kills, and outages of the database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mxn.errors import ConfigError, OverloadedError, QuotaError
from mxn.ledger.balance import check
from mxn.ledger.database import Database
from mxn.ledger.keeper import Watch
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import Ticket
from support.ledgers import (
    complete,
    count_rows,
    make_tenant,
    open_many,
    period_of,
    row_of,
    try_open,
)
from support.postgres import Postgres, find_binaries

_PROGRAM = Path(__file__).with_name("gateway_process.py")


@contextmanager
def gateway(tenant, num, mode):
    """Yield a gateway process that is registered and waits for a line."""
    url = tenant.database.url.render_as_string(hide_password=False)
    who = msgspec.json.encode(tenant.principal).decode()
    process = subprocess.Popen(
        [sys.executable, str(_PROGRAM), url, who, str(num), mode],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_never_spend_more_than_the_limit(database, tenant):
    """400 requests of 30 tokens race for a budget of 100 of them, settled at once or held."""
    budget = tenant.budget(30 * 100 + 29)
    with gateway(tenant, 200, "finish") as one, gateway(tenant, 200, "finish") as two:
        go(one), go(two)
        passed = [json.loads(process.stdout.readline()) for process in (one, two)]
    assert sum(passed) == 100
    assert count_rows(database, state="settled") == 100
    assert period_of(database, budget) == (0, 3000)
    assert check(database) == []


def test_what_a_killed_gateway_left_open_is_settled_with_its_progress(database, tenant):
    tenant.price("output", 1_000_000)
    budget = tenant.budget(10_000)
    with gateway(tenant, 20, "hang") as process:
        go(process)
        ids = json.loads(process.stdout.readline())
        assert len(ids) == 20
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    async def next_gateway():
        ledger = SqlLedger(database, heartbeat_s=0.1)
        await ledger.start()
        until_s = time.monotonic() + 10
        while await asyncio.to_thread(count_rows, database, state="open"):
            assert time.monotonic() < until_s
            await asyncio.sleep(0.02)
        await ledger.close()

    assert period_of(database, budget) == (600, 0)
    asyncio.run(next_gateway())
    row = row_of(database, ids[0])
    assert (row.reason, row.input_tokens, row.output_tokens, row.cost_micro) == (
        "gateway_lost", 10, 3, 3,
    )  # fmt: skip
    assert period_of(database, budget) == (0, 20 * 13)
    assert check(database) == []


def test_a_gateway_that_was_paused_does_not_settle_what_was_swept(database, tenant):
    """Its heart stands still for longer than `lost_after_s`, and then it comes back."""
    budget = tenant.budget(1000)

    async def scenario():
        paused = SqlLedger(database, heartbeat_s=1000)
        ticket = await paused.open(tenant.usage())
        other = SqlLedger(database, heartbeat_s=0.05, lost_after_s=0.5)
        await other.start()
        until_s = time.monotonic() + 10
        while row_of(database, ticket.usage.usage_id).state == "open":
            assert time.monotonic() < until_s
            await asyncio.sleep(0.02)
        receipt = await paused.settle(ticket, complete())
        assert (receipt.is_new, receipt.cost_micro) == (False, 0)
        assert (await paused.settle(await paused.open(tenant.usage()), complete())).is_new
        await asyncio.gather(paused.close(), other.close())

    asyncio.run(scenario())
    assert period_of(database, budget) == (0, 30)
    assert check(database) == []


def test_a_living_gateway_is_not_lost_because_the_database_was_away():
    watch = Watch(lost_after_s=10)
    assert not watch.is_lost("gw", 1, 0.0)
    assert not watch.is_lost("gw", 1, 9.0)
    watch.forget()
    assert not watch.is_lost("gw", 1, 11.0)
    assert [watch.is_lost("gw", 2, at_s) for at_s in (12.0, 14.0, 18.0)] == [False] * 3
    assert watch.is_lost("gw", 2, 22.0)


@pytest.fixture
def own_postgres():
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_settlements_outlive_a_crash_of_postgres_and_open_gives_up_in_time(own_postgres):
    """The server is killed and started three times while requests run: nothing is lost."""
    database = Database.open(own_postgres.url)
    tenant = make_tenant(database)
    budget = tenant.budget(10**9)
    settled, refused = [], []

    async def client(ledger, until):
        while not until.is_set():
            ticket = await try_open(ledger, tenant.usage())
            if isinstance(ticket, Ticket):
                settled.append(await ledger.settle(ticket, complete(10, 5)))
            else:
                refused.append(ticket)

    async def scenario():
        ledger = SqlLedger(database, open_timeout_s=0.4)
        await ledger.start()
        until = asyncio.Event()
        clients = [asyncio.create_task(client(ledger, until)) for _ in range(8)]
        for _ in range(3):
            await asyncio.sleep(0.2)
            await asyncio.to_thread(own_postgres.stop, "immediate")
            began_s = time.monotonic()
            assert isinstance(await try_open(ledger, tenant.usage()), OverloadedError)
            assert time.monotonic() - began_s < 1.5
            await asyncio.to_thread(own_postgres.start)
        await asyncio.sleep(0.5)
        until.set()
        await asyncio.gather(*clients)
        await ledger.close()

    asyncio.run(scenario())
    assert len(settled) > 20
    assert all(receipt.is_new for receipt in settled)
    assert len({receipt.usage_id for receipt in settled}) == len(settled)
    assert all(isinstance(error, OverloadedError) for error in refused)
    assert check(database) == []
    assert count_rows(database, reason="complete") == len(settled)
    assert count_rows(database, state="open") == 0  # what was opened for nobody is closed too
    assert period_of(database, budget) == (0, 15 * len(settled))
    database.close()


def test_a_commit_whose_answer_is_lost_is_not_applied_twice(database, tenant, monkeypatch):
    """Each third commit is done, and the connection breaks before anybody hears of it."""
    if database.is_sqlite:
        from mxn.ledger.sql_sqlite import SqliteStore as store_type

        error: Exception = sqlite3.OperationalError("disk I/O error")
    else:
        import psycopg

        from mxn.ledger.sql_postgres import PostgresStore as store_type

        error = psycopg.OperationalError("server closed the connection unexpectedly")
    budget = tenant.budget(30 * 30)
    num_commits, commit = 0, store_type.commit

    def lossy(store, *arguments):
        nonlocal num_commits
        commit(store, *arguments)
        num_commits += 1
        if num_commits % 3 == 0:
            store.close()
            raise error

    monkeypatch.setattr(store_type, "commit", lossy)

    async def scenario():
        ledger = SqlLedger(database)
        receipts = []
        for _ in range(10):
            tickets = await open_many(ledger, tenant, 3)
            assert all(isinstance(ticket, Ticket) for ticket in tickets)
            assert period_of(database, budget)[0] == 90
            receipts += await asyncio.gather(*(ledger.settle(one, complete()) for one in tickets))
        assert isinstance(await try_open(ledger, tenant.usage()), QuotaError)
        await ledger.close()
        return receipts

    receipts = asyncio.run(scenario())
    assert num_commits > 20
    assert all(receipt.is_new for receipt in receipts)
    assert period_of(database, budget) == (0, 900)
    assert check(database) == []


def test_another_process_that_holds_the_lock_does_not_stop_the_event_loop(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    tenant = make_tenant(database)

    async def scenario():
        ledger = SqlLedger(database, open_timeout_s=0.3)
        ticket = await ledger.open(tenant.usage())
        other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        settling = asyncio.create_task(ledger.settle(ticket, complete()))
        opening = asyncio.create_task(try_open(ledger, tenant.usage()))
        longest_s, last_s = 0.0, time.perf_counter()
        until_s = last_s + 0.6
        while time.perf_counter() < until_s:
            await asyncio.sleep(0.001)
            now_s = time.perf_counter()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
        assert longest_s < 0.25
        assert isinstance(await opening, OverloadedError)
        assert not settling.done()
        other.execute("COMMIT")
        assert (await settling).is_new
        await ledger.close()

    asyncio.run(scenario())
    assert check(database) == []
    assert count_rows(database) == 1
    database.close()


def test_a_database_that_cannot_be_reached_is_an_error_with_its_address(tmp_path):
    with pytest.raises(ConfigError, match="cannot open the ledger at postgresql"):
        Database.open(f"postgresql://mxn@/none?host={tmp_path}")
    for url in ("sqlite://", "mysql://x/y", "nonsense", "sqlite:///:memory:"):
        with pytest.raises(ConfigError):
            Database(url)


def test_processes_that_start_at_once_migrate_once(url):
    program = f"from mxn.ledger.database import Database; Database.open({url!r})"
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]


def test_the_migrations_make_the_tables_of_the_schema(database):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from mxn.ledger import schema

    with database.read() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, _: kind != "table" or name in OWN}
        )
        found = compare_metadata(context, schema.metadata)
    assert [one for one in found if _table_of(one) in OWN] == []


OWN = {
    "organizations", "projects", "users", "api_keys", "rate_limits", "rate_windows", "budgets",
    "budget_periods", "rules", "prices", "usage", "gateways", "usage_days", "rollup_state",
}  # fmt: skip


def _table_of(difference):
    if isinstance(difference, list):
        return difference[0][2]
    thing = difference[1]
    return getattr(getattr(thing, "table", thing), "name", None)


def test_many_requests_of_one_gateway_share_transactions(database, tenant):
    """64 requests at once need a few transactions: each may wait for a flush of the disk."""

    async def scenario():
        ledger = SqlLedger(database)
        await ledger.start()
        sizes = []
        deliver = ledger._writer._deliver
        ledger._writer._deliver = lambda batch: (sizes.append(len(batch.openings)), deliver(batch))
        tickets = await open_many(ledger, tenant, 64)
        assert len(sizes) <= 16
        await asyncio.gather(*(ledger.settle(ticket, complete()) for ticket in tickets))
        await ledger.close()

    asyncio.run(scenario())
    assert os.getpid()
    assert check(database) == []
