"""What a database does wrong for a moment loses no settlement and no row: standbys, lost commits,
windows that another gateway removed. Each test was a loss once."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time

import pytest
from sqlalchemy import create_engine, delete, insert, select, text

from mxn.errors import InternalError
from mxn.ledger import schema
from mxn.ledger.balance import check
from mxn.ledger.keeper import Keeper
from mxn.ledger.moments import now_us
from mxn.ledger.sql_ledger import SqlLedger
from support.ledgers import complete, count_rows, period_of, row_of, try_open

DAY_US = 86_400_000_000


@pytest.fixture
def postgres_only(database):
    if database.is_sqlite:
        pytest.skip("of PostgreSQL")


@pytest.fixture
def admin(database, postgres_only):
    """Run statements beside the ledger, on a connection that is never read-only."""
    engine = create_engine(database.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield lambda statement: connection.execute(text(statement))
    engine.dispose()


def cut_connections(admin, database):
    admin(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE application_name = 'mxn' AND datname = '{database.url.database}'"
    )


def test_a_settlement_waits_for_a_database_that_takes_no_writes(admin, database, tenant, caplog):
    """A standby, or a server in maintenance: error 25006, which the driver calls InternalError."""
    budget, name = tenant.budget(1000), database.url.database

    async def scenario():
        ledger = SqlLedger(database, open_timeout_s=0.3)
        ticket = await ledger.open(tenant.usage())
        admin("SET default_transaction_read_only = off")
        admin(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        cut_connections(admin, database)
        settling = asyncio.create_task(ledger.settle(ticket, complete(10, 5)))
        await asyncio.sleep(0.5)
        assert not settling.done()
        assert "read-only transaction" in caplog.text
        admin(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        cut_connections(admin, database)
        assert (await asyncio.wait_for(settling, 10)).is_new
        await ledger.close()

    with caplog.at_level(logging.WARNING, "mxn.ledger.writer"):
        asyncio.run(scenario())
    assert period_of(database, budget) == (0, 15)
    assert check(database) == []


def test_errors_say_whether_the_server_or_the_batch_is_at_fault():
    import psycopg
    from psycopg import errors

    from mxn.ledger.sql_postgres import PostgresStore
    from mxn.ledger.sql_sqlite import SqliteStore

    away = (
        errors.ReadOnlySqlTransaction(), errors.AdminShutdown(), errors.DiskFull(),
        errors.SerializationFailure(), errors.InFailedSqlTransaction(), errors.InternalError_(),
        psycopg.OperationalError("lost"),
    )  # fmt: skip
    refused = (
        errors.UniqueViolation(), errors.NumericValueOutOfRange(), errors.UndefinedColumn(),
        errors.ProgramLimitExceeded(), psycopg.DataError("NUL"), OverflowError(), KeyError("a bug"),
    )  # fmt: skip
    assert all(PostgresStore.is_away(error) for error in away)
    assert not any(PostgresStore.is_away(error) for error in refused)
    assert SqliteStore.is_away(sqlite3.OperationalError("disk I/O error"))
    assert SqliteStore.is_away(sqlite3.DatabaseError("database disk image is malformed"))
    assert not SqliteStore.is_away(sqlite3.IntegrityError())
    assert not SqliteStore.is_away(OverflowError())


def test_an_opening_whose_lost_commit_is_still_under_way_is_ours(
    database, tenant, postgres_only, monkeypatch
):
    """Nothing is locked but the id itself: the look before the second attempt sees no row yet."""
    import psycopg

    from mxn.ledger.sql_postgres import _INSERT, PostgresStore, _columns

    commit, slow = PostgresStore.commit, []

    def lossy(store, rows, moves, adds):
        if not rows or slow:
            return commit(store, rows, moves, adds)
        raw = store._raw
        store._run(_INSERT, _columns(rows))
        slow.append(threading.Timer(0.5, lambda: (raw.execute("COMMIT"), raw.close())))
        slow[0].start()
        store._raw = psycopg.connect(store._raw.info.dsn)
        raise psycopg.OperationalError("connection reset")

    monkeypatch.setattr(PostgresStore, "commit", lossy)

    async def scenario():
        ledger = SqlLedger(database)
        ticket = await ledger.open(tenant.usage())
        assert row_of(database, ticket.usage.usage_id).gateway_id == ledger.gateway_id
        assert (await ledger.settle(ticket, complete())).is_new
        await ledger.close()

    asyncio.run(scenario())
    slow[0].join()
    assert count_rows(database) == count_rows(database, state="settled") == 1
    assert check(database) == []


def test_an_id_that_stays_taken_ends_after_some_looks(database, tenant, monkeypatch):
    """A row that the look never finds must not keep the writer busy for ever."""
    from mxn.ledger import writer

    monkeypatch.setattr(writer, "_is_taken", lambda error: True)

    async def scenario():
        ledger = SqlLedger(database)
        found = await try_open(ledger, tenant.usage(endpoint="\ud800"))
        assert isinstance(found, InternalError)
        await ledger.settle(await ledger.open(tenant.usage()), complete())
        await ledger.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert count_rows(database) == 1


def test_windows_and_periods_that_somebody_removed_are_made_again(database, tenant):
    tenant.limit("requests", 100)
    tenant.limit("output_tokens", 10**6)
    at_us = now_us()

    async def scenario():
        ledger = SqlLedger(database, clock=lambda: at_us)
        ticket = await ledger.open(tenant.usage())
        for _ in range(3):
            with database.begin() as connection:
                connection.execute(delete(schema.rate_windows))
            assert (await ledger.settle(ticket, complete())).is_new
            with database.begin() as connection:
                connection.execute(delete(schema.rate_windows))
            ticket = await ledger.open(tenant.usage())
        await ledger.settle(ticket, complete())
        await ledger.close()

    asyncio.run(scenario())
    assert count_rows(database, state="settled") == 4


def test_the_keeper_keeps_windows_for_a_day_by_the_clock_of_the_database(
    database, tenant, monkeypatch
):
    now = now_us()
    ages_us = {"new": 0, "hours": DAY_US - 60_000_000, "old": DAY_US + 60_000_000}
    with database.begin() as connection:
        for name, age_us in ages_us.items():
            values = {"limit_id": name, "window_start": now - age_us}
            connection.execute(insert(schema.rate_windows).values(**values))
    if not database.is_sqlite:  # this gateway's clock is two days ahead
        monkeypatch.setattr("mxn.ledger.keeper.now_us", lambda: now + 2 * DAY_US)
    ledger = SqlLedger(database)
    assert isinstance(ledger.keeper, Keeper)
    ledger.keeper._drop_windows()
    with database.read() as connection:
        left = connection.execute(select(schema.rate_windows.c.limit_id)).scalars().all()
    assert sorted(left) == ["hours", "new"]
    assert time.time() * 1e6 - now < 60e6
