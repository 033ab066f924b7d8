"""Whose rows a gateway settles besides those of its own requests: never those of the living."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from mxn.ledger.balance import check
from mxn.ledger.database import Database
from mxn.ledger.keeper import Watch
from mxn.ledger.sql_ledger import SqlLedger
from support.ledgers import complete, count_rows, make_tenant, period_of, row_of, try_open

_PROGRAM = """
import asyncio, sys
import msgspec
from mxn.ledger.database import Database
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import OpenUsage, Principal

async def main(url, who, name):
    ledger = SqlLedger(Database(url), gateway_id=name, lost_after_s=1.0, heartbeat_s=0.3)
    principal = msgspec.json.decode(who, type=Principal)
    usage = OpenUsage(
        usage_id=name, request_id="r", principal=principal, endpoint="chat", model="m")
    await ledger.open(usage)
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def test_gateways_that_were_stopped_together_do_not_settle_each_other(tmp_path):
    """A machine that was suspended, or a container that was frozen: all of them live."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    database = Database.open(url)
    who = msgspec.json.encode(make_tenant(database).principal).decode()
    started = [
        subprocess.Popen([sys.executable, "-c", _PROGRAM, url, who, name], stdout=subprocess.PIPE)
        for name in "abc"
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(0.7)
        for order in (started, started[::-1]):
            for process in started:
                process.send_signal(signal.SIGSTOP)
            time.sleep(1.3)
            for process in order:
                process.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            time.sleep(0.6)
            assert count_rows(database, state="open") == 3
        started[0].kill()
        until_s = time.monotonic() + 10
        while count_rows(database, reason="gateway_lost") == 0:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert row_of(database, "a").reason == "gateway_lost"
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert count_rows(database, state="open") == 2
    database.close()


def test_a_watcher_that_slept_has_seen_nothing():
    watch = Watch(10, longest_gap_s=4)
    for at_s in (0.0, 2.0, 4.0, 6.0):
        watch.begin_look(at_s)
        assert not watch.is_lost("gw", 1, at_s)
        assert watch.end_look(at_s + 0.1)
    watch.begin_look(30.0)
    assert not watch.is_lost("gw", 1, 30.0)
    assert watch.end_look(30.1)
    found = []
    for at_s in (32.0, 34.0, 36.0, 38.0, 40.0):
        watch.begin_look(at_s)
        found.append(watch.is_lost("gw", 1, at_s))
        assert watch.end_look(at_s + 0.1)
    assert found == [False, False, False, False, True]


def test_a_look_that_took_long_does_not_count():
    watch = Watch(10, longest_gap_s=4)
    for at_s in (0.0, 3.0, 6.0, 9.0):
        watch.begin_look(at_s)
        assert not watch.is_lost("gw", 1, at_s)
    watch.begin_look(12.0)
    assert watch.is_lost("gw", 1, 12.0)
    assert not watch.end_look(17.0)  # the database stood for 5 s: the heart may have beaten
    assert not watch.is_lost("gw", 1, 17.0)


def test_one_glance_is_not_enough_however_long_ago_the_last_one_was():
    watch = Watch(10)
    assert not watch.is_lost("gw", 1, 0.0)
    assert not watch.is_lost("gw", 1, 11.0)
    assert not watch.is_lost("gw", 1, 12.0)
    assert watch.is_lost("gw", 1, 13.0)


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_a_row_that_could_not_be_settled_is_settled_by_its_own_gateway(database, tenant, mode):
    if mode == "inline" and not database.is_sqlite:
        pytest.skip("PostgreSQL is always written to from a thread")
    budget = tenant.budget(1000)

    async def scenario():
        ledger = SqlLedger(database, mode=mode, heartbeat_s=0.05, lost_after_s=0.2)
        lost, kept = await ledger.open(tenant.usage()), await ledger.open(tenant.usage())
        assert isinstance(await _settle(ledger, lost), Exception)
        until_s = time.monotonic() + 10
        while row_of(database, lost.usage.usage_id).state == "open":
            assert time.monotonic() < until_s
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert row_of(database, kept.usage.usage_id).state == "open"  # its request goes on
        assert isinstance(await try_open(ledger, tenant.usage(endpoint="\ud800")), Exception)
        assert (await ledger.settle(kept, complete(10, 5))).is_new
        await ledger.close()

    asyncio.run(scenario())
    assert count_rows(database, reason="error") == 1
    assert period_of(database, budget) == (0, 15)
    assert check(database) == []


async def _settle(ledger, ticket):
    found = await asyncio.gather(
        ledger.settle(ticket, complete(replica="\ud800")), return_exceptions=True
    )
    return found[0]
