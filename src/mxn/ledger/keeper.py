"""What a gateway does in the background: notices changed rules, says that it lives, and finds what
gateways that died have left open. A thread with a connection of its own; blocks no event loop.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from mxn.ledger import schema
from mxn.ledger.database import BUSY_MS, Database
from mxn.ledger.moments import now_us
from mxn.ledger.rules import RulesCache
from mxn.ledger.tenants import insert_once
from mxn.ledger.types import CloseReason

log = logging.getLogger(__name__)

_KEEP_WINDOWS_US = 24 * 3600 * 1_000_000  # far more than clocks of gateways may differ
_SERVER_NOW_US = text("SELECT (extract(epoch FROM now()) * 1000000)::bigint")
_MIN_STILL = 3  # looks at a heartbeat that has not moved, before its gateway is lost
_LATE_TIMES = 2  # a look that comes so many times later than it should is the first one again
_MAX_ORPHANS = 500  # settled in one go
_WAL_BYTES = 64 * 2**20  # beyond it writers wait until the log is emptied
_TRUNCATE_MS = 250
_TRUNCATE_AGAIN_S = 5.0


def this_host() -> str:
    """Return a name under which process ids are comparable: machine, boot and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:  # not Linux: a gateway that died is found by its heartbeat alone
        boot, space = "unknown", str(os.getpid())
    return f"{socket.gethostname()}/{boot}/{space}"


def is_dead(host: str, pid: int) -> bool:
    """Say whether a process is known to be gone; False when that cannot be told."""
    if host != this_host():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Watch:
    """Tells which gateways are lost by what it sees itself: a heartbeat that stands still.

    Compares no clocks of different machines. A time in which the watcher itself did not look counts
    for nobody: it may have been stopped together with those it watches, and then all their hearts
    stand where they stood. `forget` after a time in which the database was away, since nobody's
    heart could be seen to beat then. `longest_gap_s` is between two looks; None: any.
    """

    def __init__(self, lost_after_s: float, *, longest_gap_s: float | None = None) -> None:
        self._lost_after_s = lost_after_s
        self._longest_gap_s = longest_gap_s
        self._looked_s: float | None = None
        self._seen: dict[str, tuple[int | None, float, int]] = {}

    def forget(self) -> None:
        self._seen.clear()

    def begin_look(self, at_s: float) -> None:
        """Say that all heartbeats are looked at now; `at_s` is on a steady clock."""
        self._forget_if_late(at_s)
        self._looked_s = at_s

    def end_look(self, at_s: float) -> bool:
        """Return whether the look was quick enough for what it found to count."""
        return not self._forget_if_late(at_s)

    def _forget_if_late(self, at_s: float) -> bool:
        if self._longest_gap_s is None or self._looked_s is None:
            return False
        is_late = at_s - self._looked_s > self._longest_gap_s
        if is_late:
            self.forget()
        return is_late

    def is_lost(self, gateway_id: str, heartbeat_us: int | None, at_s: float) -> bool:
        """`heartbeat_us` None: the gateway never registered. `at_s` is on a steady clock."""
        known = self._seen.get(gateway_id)
        if known is None or known[0] != heartbeat_us:
            self._seen[gateway_id] = (heartbeat_us, at_s, 0)
            return False
        heartbeat_us, since_s, num_still = known
        self._seen[gateway_id] = (heartbeat_us, since_s, num_still + 1)
        return num_still + 1 >= _MIN_STILL and at_s - since_s >= self._lost_after_s


def find_orphans(connection: Connection, me: str, watch: Watch, at_s: float) -> list[Any]:
    """Return open rows of gateways that are gone."""
    usage, gateways = schema.usage, schema.gateways
    owners = connection.execute(
        select(usage.c.gateway_id, gateways)
        .select_from(usage)
        .outerjoin(gateways, gateways.c.id == usage.c.gateway_id)
        .where(usage.c.state == "open", usage.c.gateway_id != me)
        .distinct()
    ).all()
    gone = [owner.gateway_id for owner in owners if _is_gone(owner, watch, at_s)]
    if not gone:
        return []
    query = select(usage).where(usage.c.state == "open", usage.c.gateway_id.in_(gone))
    return list(connection.execute(query.order_by(usage.c.id).limit(_MAX_ORPHANS)))


def find_strays(connection: Connection, me: str, before_us: int) -> list[Any]:
    """Return rows of this gateway that are open and were opened before a time."""
    usage = schema.usage
    query = select(usage).where(
        usage.c.state == "open", usage.c.gateway_id == me, usage.c.opened_us < before_us
    )
    return list(connection.execute(query.order_by(usage.c.id)))


def _is_gone(owner: Any, watch: Watch, at_s: float) -> bool:
    if owner.id is None:
        return watch.is_lost(owner.gateway_id, None, at_s)
    if owner.state == "stopped" or is_dead(owner.host, owner.pid):
        return True
    return watch.is_lost(owner.gateway_id, owner.heartbeat_us, at_s)


class Keeper:
    """`settle_orphans` is called in the keeper's thread with rows that are to be closed, and the
    reason. `is_known` says whether this gateway still has the request of one of its own rows.
    """

    def __init__(
        self, database: Database, cache: RulesCache, gateway_id: str,
        settle_orphans: Callable[[Iterable[Any], CloseReason], None],
        is_known: Callable[[str], bool], *,
        poll_s: float, heartbeat_s: float, lost_after_s: float,
    ) -> None:  # fmt: skip
        self._database = database
        self._cache = cache
        self._gateway_id = gateway_id
        self._settle_orphans = settle_orphans
        self._is_known = is_known
        self._poll_s = poll_s
        self._lost_after_s = lost_after_s
        self._watch = Watch(lost_after_s, longest_gap_s=_LATE_TIMES * (heartbeat_s + poll_s))
        self._strays: set[str] = set()
        self._used_keys: dict[str, int] = {}
        self._is_away = False
        self._truncate_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mxn-ledger-keeper", daemon=True)
        self._jobs = [
            [poll_s, 0.0, self._refresh],
            [heartbeat_s, 0.0, self._beat],
            [heartbeat_s, 0.0, self.sweep],
            [lost_after_s, time.monotonic() + lost_after_s, self.sweep_own],
            [10.0, time.monotonic() + 10.0, self._note_used_keys],
            [60.0, 0.0, self._drop_windows],
        ]
        if database.is_sqlite:
            self._jobs.append([1.0, 0.0, self._checkpoint])

    def start(self) -> None:
        """Register the gateway, then keep on in a thread. Raises: SQLAlchemyError."""
        now = now_us()
        values = {
            "id": self._gateway_id, "host": this_host(), "pid": os.getpid(), "started_us": now,
            "heartbeat_us": now, "state": "running",
        }  # fmt: skip
        with self._database.begin() as connection:
            insert_once(connection, schema.gateways, values)
        self._beat()  # an id may be taken up again
        self._thread.start()

    def used(self, key_id: str, at_us: int) -> None:
        """Note that a key was used; written from time to time. Any thread."""
        self._used_keys[key_id] = at_us

    def stop(self) -> None:
        """End the thread and say that this gateway is gone on purpose. Raises: SQLAlchemyError."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=15)
        self._note_used_keys()
        self._set_gateway(state="stopped")

    def _work(self) -> None:
        while not self._stopped.wait(self._poll_s):
            for job in self._jobs:
                period_s, due_s, run = job
                if time.monotonic() < due_s or self._stopped.is_set():
                    continue
                job[1] = time.monotonic() + period_s
                try:
                    run()
                except SQLAlchemyError as error:
                    self._lost(error)
                except Exception:
                    log.exception("a background task of the ledger failed")
                else:
                    self._is_away = False

    def _lost(self, error: Exception) -> None:
        self._watch.forget()
        if not self._is_away:
            log.warning("the ledger's database is away: %s", error)
        self._is_away = True

    def _refresh(self) -> None:
        self._cache.refresh()

    def _beat(self) -> None:
        self._set_gateway(heartbeat_us=now_us(), state="running")

    def _set_gateway(self, **values: Any) -> None:
        table = schema.gateways
        with self._database.autocommit() as connection:
            connection.execute(update(table).where(table.c.id == self._gateway_id).values(**values))

    def sweep(self) -> int:
        """Have open rows of lost gateways settled; return how many. Raises: SQLAlchemyError."""
        self._watch.begin_look(time.monotonic())
        with self._database.read() as connection:
            rows = find_orphans(connection, self._gateway_id, self._watch, time.monotonic())
        if not self._watch.end_look(time.monotonic()):
            return 0
        if rows:
            self._cache.refresh()  # budgets and prices those gateways knew
            log.warning("settling %d requests of gateways that are gone", len(rows))
            self._settle_orphans(rows, "gateway_lost")
        return len(rows)

    def sweep_own(self) -> int:
        """Have rows settled that this gateway opened and knows nothing of any more: those whose
        settlement the database refused. Return how many. Raises: SQLAlchemyError.

        Only what two looks in a row found, since a request may have ended between the look at the
        database and the look at what is under way.
        """
        before_us = now_us() - round(self._lost_after_s * 1e6)
        with self._database.read() as connection:
            rows = find_strays(connection, self._gateway_id, before_us)
        rows = [row for row in rows if not self._is_known(row.id)]
        due = [row for row in rows if row.id in self._strays][:_MAX_ORPHANS]
        self._strays = {row.id for row in rows}
        if due:
            log.error("settling %d requests of this gateway that were left open", len(due))
            self._settle_orphans(due, "error")
        return len(due)

    def _note_used_keys(self) -> None:
        used, self._used_keys = self._used_keys, {}
        if not used:
            return
        keys = schema.api_keys
        with self._database.begin() as connection:
            for key_id, at_us in sorted(used.items()):
                change = update(keys).where(keys.c.id == key_id).values(last_used_us=at_us)
                connection.execute(change)

    def _drop_windows(self) -> None:
        table = schema.rate_windows
        with self._database.autocommit() as connection:
            now: Any = now_us()  # of SQLite, the database is on this machine
            if not self._database.is_sqlite:  # one clock for all gateways
                now = connection.execute(_SERVER_NOW_US).scalar_one()
            oldest = now - _KEEP_WINDOWS_US
            connection.execute(delete(table).where(table.c.window_start < oldest))

    def _checkpoint(self) -> None:
        """Move the log into the file; the hot path never does, since it waits for the disk."""
        log_file = Path(f"{self._database.url.database}-wal")
        size = log_file.stat().st_size if log_file.exists() else 0
        if not size:
            return
        with self._database.autocommit() as connection:
            connection.execute(text("PRAGMA wal_checkpoint(PASSIVE)"))
            if size > _WAL_BYTES and time.monotonic() > self._truncate_s:
                # Writers wait while this does, so it gives up soon when there is a long reader.
                connection.execute(text(f"PRAGMA busy_timeout={_TRUNCATE_MS}"))
                try:
                    busy = connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)")).scalar()
                finally:
                    connection.execute(text(f"PRAGMA busy_timeout={BUSY_MS}"))
                self._truncate_s = time.monotonic() + (_TRUNCATE_AGAIN_S if busy else 0)
