"""The hot path on SQLite: `BEGIN IMMEDIATE` takes the one write lock there is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mxn.ledger.bounds import MAX_SUM
from mxn.ledger.database import Database
from mxn.ledger.operations import PeriodKey, Settling
from mxn.ledger.sql import (
    CLOSED_COLUMNS,
    OPEN_COLUMNS,
    PROGRESS_COLUMNS,
    SETTLE_COLUMNS,
    View,
)  # fmt: skip


def _assign(columns: Sequence[str]) -> str:
    return ", ".join(f"{name} = ?" for name in columns[:-1])


_INSERT = (
    f"INSERT INTO usage ({', '.join(OPEN_COLUMNS)}) VALUES ({', '.join('?' for _ in OPEN_COLUMNS)})"
)
_SETTLE = (
    f"UPDATE usage SET state = 'settled', {_assign(SETTLE_COLUMNS)} WHERE id = ? AND state = 'open'"
)
_PROGRESS = f"UPDATE usage SET {_assign(PROGRESS_COLUMNS)} WHERE id = ? AND state = 'open'"
_PERIOD = "SELECT reserved, spent FROM budget_periods WHERE budget_id = ? AND period_start = ?"
_WINDOW = "SELECT used FROM rate_windows WHERE limit_id = ? AND window_start = ?"
_MOVE = (
    "INSERT INTO budget_periods (budget_id, period_start, reserved, spent) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (budget_id, period_start) DO UPDATE "
    "SET reserved = reserved + excluded.reserved, "
    f"spent = min(spent + excluded.spent, {MAX_SUM})"
)
_ADD = (
    "INSERT INTO rate_windows (limit_id, window_start, used) VALUES (?, ?, ?) "
    "ON CONFLICT (limit_id, window_start) DO UPDATE SET used = used + excluded.used"
)
_EXISTING = "SELECT id, gateway_id, opened_us FROM usage WHERE id = ?"
# A row that breaks a rule, a value that cannot be kept, a statement that does not fit its values.
_REFUSED = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)
_CLOSED = f"SELECT {', '.join(CLOSED_COLUMNS)} FROM usage WHERE id = ?"


class SqliteStore:
    """`busy_ms` is how long `begin` waits for another process, in a sleep that stops its thread."""

    def __init__(self, database: Database, *, busy_ms: int) -> None:
        fairy = database.engine.raw_connection()
        raw = fairy.driver_connection
        fairy.detach()
        assert isinstance(raw, sqlite3.Connection)
        self._raw = raw
        self._raw.execute(f"PRAGMA busy_timeout={busy_ms}")
        # A checkpoint writes to the disk and waits for it; the keeper's thread does that.
        self._raw.execute("PRAGMA wal_autocheckpoint=0")
        self._cursor = self._raw.cursor()

    @staticmethod
    def is_away(error: BaseException) -> bool:
        return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, _REFUSED)

    def begin(
        self,
        periods: Sequence[PeriodKey],
        windows: Sequence[PeriodKey],
        settlings: Sequence[Settling],
        progress: Sequence[tuple[Any, ...]],
        ids: Sequence[str],
        *,
        decides: bool = True,
    ) -> View:
        execute, view = self._cursor.execute, View()
        execute("BEGIN IMMEDIATE")
        if decides:
            for key in periods:
                view.periods[key] = execute(_PERIOD, key).fetchone() or (0, 0)
            for key in windows:
                view.windows[key] = (execute(_WINDOW, key).fetchone() or (0,))[0]
        for settling in settlings:
            if execute(_SETTLE, settling.row).rowcount == 1:
                view.settled.add(settling.id)
        if progress:
            self._cursor.executemany(_PROGRESS, progress)
        for row_id in ids:
            if row := execute(_EXISTING, (row_id,)).fetchone():
                view.existing[row_id] = (row[1], row[2])
        return view

    def closed(self, ids: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        rows = (self._cursor.execute(_CLOSED, (row_id,)).fetchone() for row_id in ids)
        return {row[0]: row for row in rows if row is not None}

    def commit(
        self,
        rows: Sequence[tuple[Any, ...]],
        moves: Mapping[PeriodKey, Sequence[int]],
        adds: Mapping[PeriodKey, int],
    ) -> None:
        cursor = self._cursor
        if rows:
            cursor.executemany(_INSERT, rows)
        if moves:
            cursor.executemany(
                _MOVE,
                [(*key, *amounts) for key, amounts in moves.items() if amounts[0] or amounts[1]],
            )
        if adds:
            cursor.executemany(_ADD, [(*key, used) for key, used in adds.items() if used])
        cursor.execute("COMMIT")

    def rollback(self) -> None:
        if self._raw.in_transaction:
            self._raw.rollback()

    def close(self) -> None:
        self._raw.close()
