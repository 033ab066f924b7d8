"""Fixtures of empty ledgers: each test runs on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import itertools

import pytest
from sqlalchemy import create_engine, text

from mxn.ledger.database import Database
from support.postgres import Postgres, find_binaries

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres():
    """A server with a database `ready` that holds the tables; `Postgres.url` names another one."""
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    server = Postgres()
    try:
        server.start()
        _admin(server, "CREATE DATABASE ready")
        Database.open(_url(server, "ready")).close()
        yield server
    finally:
        server.remove()


def _url(server: Postgres, name: str) -> str:
    return server.url.replace("/postgres?", f"/{name}?")


def _admin(server: Postgres, statement: str) -> None:
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The URL of an empty ledger."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    server = request.getfixturevalue("postgres")
    name = f"test{next(_numbers)}"
    _admin(server, f"CREATE DATABASE {name} TEMPLATE ready")
    return _url(server, name)


@pytest.fixture
def database(url):
    opened = Database.open(url)
    yield opened
    opened.close()
