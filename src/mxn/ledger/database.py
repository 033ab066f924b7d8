"""One database of the ledger: SQLite in a file, or PostgreSQL by URL. Knows no requests.

Start at `Database.open`. On SQLite a transaction takes the write lock when it begins, so that it
never fails in the middle because another process wrote; `Database.read` takes none.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from mxn import env
from mxn.errors import ConfigError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_MS = 10_000  # a writer waits so long for another process before it gives up
_CONNECT_S = 3
_MIGRATION_LOCK = 0x6D786E  # any fixed number: the advisory lock of PostgreSQL
_READ, _AUTOCOMMIT = "mxn_read", "mxn_autocommit"
_SYNCS = ("normal", "full")


def default_url() -> str:
    """Return MXN_DATABASE, or the SQLite file in the state folder."""
    return env.get("MXN_DATABASE") or f"sqlite:///{env.home() / 'ledger.db'}"


class Database:
    """An engine with the settings the ledger needs. Threads and forks share no connection.

    `sync` is for SQLite: with ``normal`` what was committed survives any crash of a process, with
    ``full`` also the loss of power, at the price of a disk flush for each transaction.
    """

    def __init__(self, url: str | None = None, *, sync: str | None = None) -> None:
        self.url = _parse(url or default_url())
        self.sync = sync or env.get("MXN_DATABASE_SYNC")
        if self.sync not in _SYNCS:
            raise ConfigError(f"MXN_DATABASE_SYNC must be normal or full, got {self.sync!r}")
        self.engine = _sqlite(self.url, self.sync) if self.is_sqlite else _postgresql(self.url)

    @classmethod
    def open(cls, url: str | None = None, *, sync: str | None = None) -> Database:
        """Return the database at a URL, brought to the present tables.

        Raises: ConfigError for a URL that cannot be, and when the database cannot be reached.
        """
        database = cls(url, sync=sync)
        try:
            database.migrate()
        except OperationalError as error:
            database.close()
            raise ConfigError(
                f"cannot open the ledger at {database}: {str(error.orig).strip()}",
                hint="is the database running, and may this user write to it?",
            ) from error
        return database

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def migrate(self) -> None:
        """Bring the tables to the newest revision; of several processes one does it."""
        from mxn.ledger.migrations.upgrade import upgrade

        with self.engine.begin() as connection:
            if not self.is_sqlite:  # the write lock of SQLite is enough
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            upgrade(connection)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Yield a connection in a transaction, committed at the end of the block."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the database and keeps no writer waiting."""
        with self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(**{_READ: True})
            else:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """Yield a connection on which each statement is a transaction, so that no lock is held
        while the thread waits for its turn."""
        with self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(**{_AUTOCOMMIT: True})
            else:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)


def _parse(url: str) -> URL:
    """Return a URL with its driver. Raises: ConfigError."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend in ("postgres", "postgresql") and parsed.drivername != "postgresql+psycopg":
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(
            f"cannot use {url!r} as a database: {error}",
            hint="write sqlite:////path/ledger.db or postgresql://user@host/name",
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"the ledger needs sqlite or postgresql, got {parsed.drivername!r}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("the ledger needs a file; a database in memory would not survive")
    return parsed


def _sqlite(url: URL, sync: str) -> Engine:
    assert url.database is not None
    Path(url.database).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, connect_args={"timeout": BUSY_MS / 1000, "check_same_thread": False}
    )
    event.listen(engine, "connect", lambda connection, _: _tune_sqlite(connection, sync))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _tune_sqlite(connection: Any, sync: str) -> None:
    raw: sqlite3.Connection = getattr(connection, "driver_connection", connection)
    raw.isolation_level = None  # transactions are begun by `_begin_sqlite` and nobody else
    deadline_s = time.monotonic() + BUSY_MS / 1000
    while True:
        try:
            raw.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:  # this one statement does not wait for other processes
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    raw.execute(f"PRAGMA synchronous={sync.upper()}")
    raw.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get(_AUTOCOMMIT):
        connection.exec_driver_sql("BEGIN" if options.get(_READ) else "BEGIN IMMEDIATE")


def _postgresql(url: URL) -> Engine:
    arguments = {
        "connect_timeout": _CONNECT_S, "application_name": "mxn",
        # A peer that vanished without a word is noticed within seconds.
        "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }  # fmt: skip
    return create_engine(url, connect_args=arguments, pool_pre_ping=True, pool_size=4)
