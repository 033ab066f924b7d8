"""The whole experiment: a pool, tenants, load, and somebody who kills. Start at `run_chaos`.

python -m chaos.chaos --requests 10000 --gateways 2 --database postgresql://…   (in tests/)
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from sqlalchemy import text

from chaos.clients import Load, Tenant
from chaos.judge import Verdict, judge, wait_for_rest
from chaos.processes import Server, gateway, replica
from mxn.ledger import budget_admin, keys, tenants
from mxn.ledger.database import Database
from support.postgres import Postgres

MODEL = Path(__file__).parents[2] / "src/mxn/shipped/mxn-shakespeare-llama"
LOST_AFTER_S = 10.0


@dataclass(slots=True)
class Killer:
    """Kills something at random moments until told to stop, and starts it again."""

    replicas: list[Server]
    gateways: list[Server]
    database: Database
    seed: int
    pause_s: tuple[float, float] = (1.0, 4.0)
    postgres: Postgres | None = None
    kills: dict[str, int] = field(default_factory=dict)
    failure: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # in a thread: nobody would see it
            self.failure = error

    def _run(self) -> None:
        rng = random.Random(self.seed)
        while not self._stop.wait(rng.uniform(*self.pause_s)):
            self._restart_ended()
            what = rng.choices(["replica", "gateway", "database"], [3, 2, 1])[0]
            if what == "database":
                self._disturb(rng)
            else:
                kind = self.replicas if what == "replica" else self.gateways
                ready = [server for server in kind if server.is_ready()]
                # One replica stays, so that there is somewhere to go on.
                if len(ready) < (2 if what == "replica" else 1):
                    continue
                self._kill(rng.choice(ready), rng)
            self.kills[what] = self.kills.get(what, 0) + 1

    def stop(self) -> None:
        self._stop.set()

    def _restart_ended(self) -> None:
        """Do what a supervisor does: a gateway that finds no database at its start gives up."""
        for server in (*self.replicas, *self.gateways):
            if server.has_ended():
                self.kills["restarted"] = self.kills.get("restarted", 0) + 1
                server.start()

    def _kill(self, server: Server, rng: random.Random) -> None:
        server.kill()
        time.sleep(rng.uniform(0, 0.5))
        server.start()  # it comes back while others are killed

    def _disturb(self, rng: random.Random) -> None:
        """Kill PostgreSQL or cut its connections, or lock the file of SQLite for a while."""
        if self.database.is_sqlite:
            with self.database.begin():
                time.sleep(rng.uniform(0.05, 0.6))
            return
        if self.postgres is not None and rng.random() < 0.4:
            self.postgres.kill()
            time.sleep(rng.uniform(0.1, 1.0))
            self.postgres.start()
            return
        with self.database.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND datname = current_database()"
                )
            )


@dataclass(slots=True)
class Result:
    verdict: Verdict
    kills: dict[str, int]
    seconds: float


def make_tenants(database: Database, tight_tokens: int) -> list[Tenant]:
    """Return four tenants; two of them have a budget that the load will use up."""
    made = []
    with database.begin() as connection:
        now = time.time_ns() // 1000
        for number in range(4):
            org = tenants.create_org(connection, f"org{number}", now_us=now)
            project = tenants.create_project(connection, org, "main", now_us=now)
            _, key = keys.create_key(connection, project, name="key", now_us=now)
            limit = tight_tokens if number % 2 else 10**9
            budget_admin.set_budget(
                connection,
                tenants.Subject("org", org),
                limit_amount=limit,
                period="total",
                now_us=now,
            )
            made.append(Tenant(f"org{number}", key, limit))
    return made


def run_chaos(
    home: Path, database_url: str, *, requests: int, gateways: int = 1, replicas: int = 3,
    seed: int = 0, pause_s: tuple[float, float] = (1.0, 4.0), at_once: int = 24,
    postgres: Postgres | None = None,
) -> Result:  # fmt: skip
    """Run it all and return what the judge says."""
    database = Database.open(database_url)
    owners = make_tenants(database, tight_tokens=requests * 4)
    engines = [
        replica(f"replica{number}", MODEL, home, "--dtype", "float32") for number in range(replicas)
    ]
    fronts = [
        gateway(f"gateway{number}", engines, database_url, home, "--stall-limit", "5")
        for number in range(gateways)
    ]
    began_s = time.monotonic()
    killer = Killer(engines, fronts, database, seed, pause_s, postgres)
    try:
        for server in (*engines, *fronts):
            server.start()
        for server in (*engines, *fronts):
            server.wait()
        thread = threading.Thread(target=killer.run)
        thread.start()
        try:
            load = Load([item.url for item in fronts], owners, requests, at_once, seed)
            outcomes = asyncio.run(load.run(lambda: killer.failure))
        finally:
            killer.stop()
            thread.join()
        if killer.failure is not None:
            raise killer.failure
        wait_for_rest(database)
        verdict = judge(database, outcomes, owners)
    finally:
        for server in (*fronts, *engines):
            server.stop()
        database.close()
    return Result(verdict, killer.kills, time.monotonic() - began_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--postgres", action="store_true", help="a server of its own, not SQLite")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    postgres = None
    if options.postgres:
        postgres = Postgres(is_fast=False)
        postgres.start()
    with tempfile.TemporaryDirectory() as folder:
        url = postgres.url if postgres else f"sqlite:///{folder}/ledger.db"
        result = run_chaos(
            Path(folder), url, requests=options.requests, gateways=options.gateways,
            seed=options.seed, postgres=postgres,
        )  # fmt: skip
    if postgres is not None:
        postgres.remove()
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    raise SystemExit(1 if result.verdict.problems else 0)


if __name__ == "__main__":
    main()
