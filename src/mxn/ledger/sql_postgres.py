"""The hot path on PostgreSQL: two round trips for a transaction, whatever it holds.

Rows of budgets and limits are made before the transaction that locks them, so that two gateways
that make the same row do not wait for each other while they hold locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, LiteralString, cast

import psycopg

from mxn.ledger.bounds import MAX_SUM
from mxn.ledger.database import Database
from mxn.ledger.operations import PeriodKey, Settling
from mxn.ledger.sql import (
    CLOSED_COLUMNS,
    OPEN_COLUMNS,
    PROGRESS_COLUMNS,
    SETTLE_COLUMNS,
    View,
    type_of,
)  # fmt: skip


def _unnest(columns: Sequence[str]) -> str:
    return f"unnest({', '.join(f'%s::{type_of(name)}[]' for name in columns)})"


def _update(columns: Sequence[str], more: str = "") -> str:
    sets = more + ", ".join(f"{name} = v.{name}" for name in columns[:-1])
    return (
        f"UPDATE usage AS u SET {sets} FROM {_unnest(columns)} AS v({', '.join(columns)}) "
        "WHERE u.id = v.id AND u.state = 'open'"
    )


_INSERT = f"INSERT INTO usage ({', '.join(OPEN_COLUMNS)}) SELECT * FROM {_unnest(OPEN_COLUMNS)}"
_SETTLE = _update(SETTLE_COLUMNS, "state = 'settled', ") + " RETURNING u.id"
_PROGRESS = _update(PROGRESS_COLUMNS)
_KEYS = "unnest(%s::text[], %s::bigint[]) AS v(id, start)"
_MAKE_PERIODS = (
    f"INSERT INTO budget_periods (budget_id, period_start) SELECT * FROM {_KEYS} "
    "ON CONFLICT DO NOTHING"
)
_MAKE_WINDOWS = (
    f"INSERT INTO rate_windows (limit_id, window_start) SELECT * FROM {_KEYS} "
    "ON CONFLICT DO NOTHING"
)
_PERIODS = (
    f"SELECT p.budget_id, p.period_start, p.reserved, p.spent FROM budget_periods AS p "
    f"JOIN {_KEYS} ON p.budget_id = v.id AND p.period_start = v.start "
    "ORDER BY 1, 2 FOR UPDATE OF p"
)
_WINDOWS = (
    f"SELECT w.limit_id, w.window_start, w.used FROM rate_windows AS w "
    f"JOIN {_KEYS} ON w.limit_id = v.id AND w.window_start = v.start ORDER BY 1, 2 FOR UPDATE OF w"
)
_MOVE = (
    "UPDATE budget_periods AS p SET reserved = p.reserved + v.reserved, "
    f"spent = least(p.spent + v.spent, {MAX_SUM}) "
    "FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[]) "
    "AS v(id, start, reserved, spent) WHERE p.budget_id = v.id AND p.period_start = v.start"
)
_ADD = (
    "UPDATE rate_windows AS w SET used = w.used + v.used "
    "FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS v(id, start, used) "
    "WHERE w.limit_id = v.id AND w.window_start = v.start"
)
_EXISTING = "SELECT id, gateway_id, opened_us FROM usage WHERE id = ANY(%s)"
_CLOSED = f"SELECT {', '.join(CLOSED_COLUMNS)} FROM usage WHERE id = ANY(%s)"

_MAX_KNOWN = 100_000
_MAX_MAKES = 5  # times that rows of budgets and limits are made again when somebody drops them

# Classes of SQLSTATE that are the fault of what was asked: data, constraints, statements, sizes.
# All others say something about the server: a standby, no more disk, no more connections.
_REFUSED = ("22", "23", "42", "54")


class PostgresStore:
    def __init__(self, database: Database) -> None:
        fairy = database.engine.raw_connection()
        self._raw = cast("psycopg.Connection[Any]", fairy.driver_connection)
        fairy.detach()
        self._raw.autocommit = True  # BEGIN and COMMIT are ours, within a pipeline
        self._known: set[tuple[str, PeriodKey]] = set()

    @staticmethod
    def is_away(error: BaseException) -> bool:
        if not isinstance(error, psycopg.Error):
            return False
        if error.sqlstate is None:  # of the driver: a lost connection, or values it cannot send
            return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        return error.sqlstate[:2] not in _REFUSED

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
        missing: list[tuple[str, PeriodKey]] = []
        for _ in range(_MAX_MAKES):
            self._make(_MAKE_PERIODS, periods)
            self._make(_MAKE_WINDOWS, windows)
            view = self._begin(periods, windows, settlings, progress, ids)
            missing = [(_MAKE_PERIODS, key) for key in periods if key not in view.periods]
            missing += [(_MAKE_WINDOWS, key) for key in windows if key not in view.windows]
            if not missing:
                return view
            self.rollback()  # rows that this connection made, and somebody removed since
            self._known.difference_update(missing)
        raise psycopg.OperationalError(f"rows of budgets or limits do not stay: {missing[:3]}")

    def _begin(
        self,
        periods: Sequence[PeriodKey],
        windows: Sequence[PeriodKey],
        settlings: Sequence[Settling],
        progress: Sequence[tuple[Any, ...]],
        ids: Sequence[str],
    ) -> View:
        with self._raw.pipeline():
            self._raw.execute("BEGIN")
            locked = self._run(_PERIODS, _columns(periods)) if periods else ()
            counted = self._run(_WINDOWS, _columns(windows)) if windows else ()
            rows = sorted((one.row for one in settlings), key=lambda row: row[-1])
            settled = self._run(_SETTLE, _columns(rows)) if rows else ()
            if progress:
                self._run(_PROGRESS, _columns(sorted(progress, key=lambda row: row[-1])))
            # After the locks: what another connection of ours was committing is visible now.
            existing = self._run(_EXISTING, (list(ids),)) if ids else ()
        return View(
            {(row[0], row[1]): (row[2], row[3]) for row in locked},
            {(row[0], row[1]): row[2] for row in counted},
            {row[0] for row in settled},
            {row[0]: (row[1], row[2]) for row in existing},
        )

    def _run(self, statement: str, parameters: Sequence[Any]) -> psycopg.Cursor[Any]:
        return self._raw.execute(cast("LiteralString", statement), parameters)

    def _make(self, statement: str, keys: Sequence[PeriodKey]) -> None:
        new = [key for key in keys if (statement, key) not in self._known]
        if new:
            self._run(statement, _columns(new))
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            self._known.update((statement, key) for key in new)

    def closed(self, ids: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        return {row[0]: row for row in self._run(_CLOSED, (list(ids),))}

    def commit(
        self,
        rows: Sequence[tuple[Any, ...]],
        moves: Mapping[PeriodKey, Sequence[int]],
        adds: Mapping[PeriodKey, int],
    ) -> None:
        moved = [(*key, *amounts) for key, amounts in moves.items() if any(amounts)]
        added = [(*key, used) for key, used in adds.items() if used]
        with self._raw.pipeline():
            if rows:
                self._run(_INSERT, _columns(rows))
            if moved:
                self._run(_MOVE, _columns(moved))
            if added:
                self._run(_ADD, _columns(added))
            self._raw.execute("COMMIT")

    def rollback(self) -> None:
        if not self._raw.closed and not self._raw.broken:
            self._raw.execute("ROLLBACK")

    def close(self) -> None:
        self._raw.close()


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
