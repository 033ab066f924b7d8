"""What a gateway and its replicas hold while requests go through, and what they must not keep.

Compares samples of /proc, of /load and of the ledger. Knows no clients but their sums. Start at
`look`; `grown`, `kept`, `busy` and `books` return what is wrong, in words.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from player import Tally
from samples import Held, growth, sample

from mxn.ledger.balance import check
from mxn.ledger.database import Database

NOISE_KIB = 2048
# The ledger's pool of SQLite connections, each a file and its log, is filled when it is first busy.
_SLACK = {"num_sockets": 0, "num_files": 4, "num_threads": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Servers under test: process ids by name, and where requests go."""

    url: str
    key: str
    database: Path
    pids: dict[str, int]
    replicas: tuple[str, ...]  # addresses that answer /load


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    seconds: float
    requests: int
    rows: int
    database_bytes: int
    log_bytes: int  # of SQLite's write-ahead log, which is written again from its start
    held: dict[str, Held]


def look(pool: Pool, tally: Tally, begun_s: float) -> Sample:
    """Return what everything holds now."""
    log = Path(f"{pool.database}-wal")
    with contextlib.closing(sqlite3.connect(pool.database)) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM usage").fetchone()
    return Sample(
        seconds=round(time.monotonic() - begun_s, 1),
        requests=tally.done + tally.left,
        rows=rows,
        database_bytes=pool.database.stat().st_size,
        log_bytes=log.stat().st_size if log.exists() else 0,
        held={name: sample(pid) for name, pid in pool.pids.items()},
    )


def slope(samples: list[Sample], name: str) -> float:
    """Return the growth of memory in KiB for 10,000 requests; the last look is at rest, so out."""
    at = [item.requests / 10_000 for item in samples[:-1]]
    return growth(at, [item.held[name].rss_kib for item in samples[:-1]])


def grown(slopes: dict[str, float], num_requests: int, limit_kib: float) -> list[str]:
    """Return whose memory follows the number of requests; KiB for 10,000 of them.

    In a short run a single step of the allocator makes a steep line: growth of less than
    `NOISE_KIB` in the part that is judged proves nothing.
    """
    judged = 2 / 3 * num_requests / 10_000
    return [
        f"{name} grows by {slope:.0f} KiB for 10,000 requests, above {limit_kib:.0f}"
        for name, slope in slopes.items()
        if slope > limit_kib and slope * judged > NOISE_KIB
    ]


def kept(before: Sample, after: Sample) -> list[str]:
    """Return what is there afterwards and was not there at rest before."""
    problems = []
    for name, held in after.held.items():
        for what, slack in _SLACK.items():
            was, is_now = getattr(before.held[name], what), getattr(held, what)
            if is_now > was + slack:
                problems.append(f"{name} had {was} {what} at rest and has {is_now} afterwards")
    return problems


async def busy(pool: Pool) -> list[str]:
    """Return what replicas still run or hold; pages kept for prompts to come are no part of it."""
    problems = []
    async with httpx.AsyncClient() as http:
        for url in pool.replicas:
            (model,) = (await http.get(f"{url}/load")).json()["models"].values()
            if model is None or model["running"] or model["waiting"] or model["kv_pages_used"]:
                problems.append(f"{url} still holds {model}")
    return problems


def books(pool: Pool, tallies: tuple[Tally, ...], others: int) -> list[str]:
    """Return what the ledger and the clients do not agree on; `others`: rows of nobody counted."""
    database = Database.open(f"sqlite:///{pool.database}")
    problems = check(database)
    database.close()
    with contextlib.closing(sqlite3.connect(pool.database)) as connection:
        (num_open,) = connection.execute(
            "SELECT count(*) FROM usage WHERE state != 'settled'"
        ).fetchone()
        (reserved,) = connection.execute("SELECT sum(reserved) FROM budget_periods").fetchone()
        held = connection.execute(
            "SELECT count(*), sum(input_tokens), sum(output_tokens) FROM usage "
            "WHERE reason = 'complete'"
        ).fetchone()
    if num_open or reserved:
        problems.append(f"{num_open} rows are open, {reserved} tokens reserved")
    told = tuple(
        sum(getattr(tally, name) for tally in tallies)
        for name in ("done", "input_tokens", "output_tokens")
    )
    # Whoever left after the last token had a complete answer: their rows may stand here too.
    most = told[0] + sum(tally.left for tally in tallies) + others
    if not told[0] <= held[0] <= most or held[1] < told[1] or held[2] < told[2]:
        problems.append(f"(requests, input, output): clients were told {told}, rows say {held}")
    return problems
