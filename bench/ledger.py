"""Speed of the ledger: opens and settles per second, and the time each takes for its caller.

    python bench/ledger.py [--seconds 3] [--mode auto|inline|thread] [--database URL]

Without a URL: SQLite in a temporary folder, then a PostgreSQL of our own where it is installed.
Every request has a key with a requests limit, a token budget and a money budget. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from mxn.ledger import budget_admin, keys, limits, prices, tenants
from mxn.ledger.balance import check
from mxn.ledger.database import Database
from mxn.ledger.moments import now_us
from mxn.ledger.prices import NewPrice
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import OpenUsage, Settlement

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def prepare(database: Database) -> str:
    """Return a key whose project has a price, a limit and two budgets."""
    now = now_us()
    with database.begin() as connection:
        project = tenants.ensure_default(connection, now_us=now)
        _, key = keys.create_key(connection, project, name="bench", now_us=now)
        subject = tenants.Subject("project", project)
        limits.set_limit(connection, subject, "requests", 10**9)
        for currency in (None, "USD"):
            budget_admin.set_budget(
                connection, subject, limit_amount=10**15, period="month", now_us=now,
                currency=currency,
            )  # fmt: skip
        price = NewPrice(
            model="*", chip="*", kind="input", micro_per_million=500_000, currency="USD",
            valid_from_us=now,
        )  # fmt: skip
        prices.set_prices(connection, [price], now_us=now)
    return key


async def client(
    ledger: SqlLedger, key: str, name: str, until_s: float, times: list[tuple[float, float]]
) -> None:
    used = Settlement(reason="complete", chip="cpu", input_tokens=100, output_tokens=32)
    number = 0
    while time.perf_counter() < until_s:
        number += 1
        began = time.perf_counter()
        usage = OpenUsage(
            usage_id=f"chatcmpl-{name}-{number}", request_id="r", endpoint="chat", model="m",
            principal=await ledger.authenticate(key), chips=("cpu",), input_tokens=100,
            max_output_tokens=32,
        )  # fmt: skip
        ticket = await ledger.open(usage)
        opened = time.perf_counter()
        await ledger.settle(ticket, used)
        times.append((opened - began, time.perf_counter() - opened))


async def measure(database: Database, key: str, mode: Any, num: int, seconds: float) -> dict:
    ledger = SqlLedger(database, mode=mode)
    await ledger.start()
    warm = time.perf_counter() + 0.3
    await asyncio.gather(
        *(client(ledger, key, f"{os.urandom(4).hex()}w{i}", warm, []) for i in range(num))
    )
    times: list[tuple[float, float]] = []
    began, cpu = time.perf_counter(), time.process_time()
    run = os.urandom(4).hex()
    await asyncio.gather(
        *(client(ledger, key, f"{run}-{i}", began + seconds, times) for i in range(num))
    )
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    await ledger.close()
    result: dict[str, Any] = {
        "clients": num,
        "mode": ledger.mode,
        "requests_per_s": round(len(times) / wall_s),
        "cpu_us_per_request": round(cpu_s / len(times) * 1e6, 1),
    }
    for index, what in enumerate(("open", "settle")):
        cuts = statistics.quantiles([one[index] * 1e6 for one in times], n=100)
        result |= {f"{what}_p50_us": round(cuts[49]), f"{what}_p99_us": round(cuts[98])}
    return result


def databases(url: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, URL) of each database; the next starts when the one before was measured."""
    if url is not None:
        yield "given", url
        return
    from support.postgres import Postgres, find_binaries

    with tempfile.TemporaryDirectory() as folder:
        yield "sqlite", f"sqlite:///{folder}/ledger.db"
    if find_binaries() is None:
        print("no PostgreSQL on this machine", file=sys.stderr)
        return
    server = Postgres(is_fast=False)
    try:
        server.start()
        yield "postgresql", server.url
    finally:
        server.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--mode", default="auto", choices=("auto", "inline", "thread"))
    parser.add_argument("--database", metavar="URL")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    results = []
    for name, url in databases(arguments.database):
        database = Database.open(url)
        key = prepare(database)
        mode = arguments.mode if database.is_sqlite else "thread"
        for num in (1, 64):
            made = measure(database, key, mode, num, arguments.seconds)
            results.append({"database": name} | uvloop.run(made))
            print(results[-1], flush=True)
        problems = check(database)
        database.close()
        if problems:
            raise SystemExit("\n".join(problems))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    document = {"case": "ledger", "basis": "measured", "machine": machine, "results": results}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
