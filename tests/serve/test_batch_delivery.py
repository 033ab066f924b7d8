"""What is billed is delivered: a database that fails, a gateway that stops, a lease that moves.

The store and the worker run on SQLite, and on PostgreSQL where it is installed.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

import mxn.serve.batch.store as store_module
from mxn.ledger.keys import import_key
from mxn.ledger.schema import api_keys, gateways, organizations, projects, usage
from mxn.ledger.types import Principal
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import BatchRequest
from mxn.serve.batch.worker import BatchWorker

URL = "/v1/completions"
OWNER = Principal(key_id="k", org_id="o", project_id="p")


def line(custom_id):
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m"}}
    ).encode()


def make(database, num_lines, owner=OWNER):
    data = b"".join(line(str(i)) + b"\n" for i in range(num_lines))
    file = FileStore(database).write([data], owner=owner, filename="f", purpose="batch")
    request = BatchRequest(input_file_id=file.id, endpoint=URL, completion_window="24h")
    return BatchStore(database).create(request, owner)


async def until(condition, *, within_s=20.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


def away():
    return OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))


def failing(method, *, times):
    """Return `method` as it is with a database that is away for its first calls."""
    left = [times]

    def call(*args):
        if left[0]:
            left[0] -= 1
            raise away()
        return method(*args)

    call.left = left
    return call


def settle(database, context, *, reason="complete"):
    row = {
        "id": context.usage_id, "request_id": "r", "gateway_id": "g1", "org_id": "o",
        "project_id": "p", "key_id": "k", "endpoint": "e", "model": "m", "state": "settled",
        "reason": reason, "opened_us": 1, "settled_us": 2, "is_stream": False,
        "batch_id": context.batch_id, "output_tokens": 5 if reason == "complete" else 0,
    }  # fmt: skip
    with database.begin() as connection:
        connection.execute(usage.insert().values(**row))


def paid(database):
    with database.read() as connection:
        return connection.execute(select(usage.c.id)).scalars().all()


def billing(database):
    async def call(path, body, context):
        if context.is_billed:
            await asyncio.to_thread(settle, database, context)
        return 200, {}, b"{}"

    return call


async def work(database, batches, call, made, *, status="completed", **options):
    worker = BatchWorker(FileStore(database), batches, call, gateway_id="g1", **options)
    worker.start()
    try:
        await until(lambda: BatchStore(database).get(made.id, "p").status == status)
    finally:
        await worker.stop()


def delivered(database, made):
    found = BatchStore(database).get(made.id, "p")
    lines = b"".join(FileStore(database).read(found.output_file_id)).splitlines()
    return found, [json.loads(item)["custom_id"] for item in lines]


@pytest.mark.parametrize("name", ["end_line", "start_line", "next_lines"])
def test_a_line_whose_database_is_away_waits_and_is_delivered(database, name):
    made, batches = make(database, 12), BatchStore(database)
    broken = failing(getattr(batches, name), times=3)
    setattr(batches, name, broken)
    asyncio.run(work(database, batches, billing(database), made))
    found, lines = delivered(database, made)
    assert broken.left == [0]
    assert found.request_counts.completed == 12 == len(set(lines)) == len(lines)
    assert len(paid(database)) == 12
    assert found.usage.output_tokens == 60


def test_a_look_at_an_earlier_attempt_waits_for_the_database_too(database):
    made, batches = make(database, 1), BatchStore(database)
    held = batches.claim("dead", 0.0)
    batches.begin(held, "m", [("0", '{"model":"m"}')])
    batches.start_line(held, 1, "first")
    batches.release(held)
    batches.state_of = failing(batches.state_of, times=2)
    asyncio.run(work(database, batches, billing(database), made))
    assert delivered(database, made)[1] == ["0"]


def test_a_batch_with_a_line_that_has_no_result_never_ends(database):
    """An error that waiting does not heal: the others are delivered, and the batch stays open."""
    made, batches = make(database, 5), BatchStore(database)
    end, asked = batches.end_line, []

    def refuses(held, number, state, result):
        asked.append(number)
        if number == 3:
            raise ValueError("cannot be stored")
        return end(held, number, state, result)

    batches.end_line = refuses

    async def main():
        worker = BatchWorker(FileStore(database), batches, billing(database), gateway_id="g1")
        worker.start()
        await until(lambda: len(asked) == 5)
        await until(lambda: not worker._working)
        await worker.stop()

    asyncio.run(main())
    found = batches.get(made.id, "p")
    assert (found.status, found.request_counts.completed) == ("in_progress", 4)
    held = BatchStore(database).claim("g1", 0.0) or None
    assert held is None, "its lease has not stood still yet"
    with database.begin() as connection:
        connection.execute(update(store_module.batches).values(lease_us=0))
    asyncio.run(work(database, BatchStore(database), billing(database), made))
    assert len(delivered(database, made)[1]) == 5
    assert len(paid(database)) == 5, "the line that was paid is delivered without paying again"


def test_finalizing_is_refused_while_a_line_is_open(database):
    made, batches = make(database, 2), BatchStore(database)
    held = batches.claim("g1", 30.0)
    batches.begin(held, "m", [("a", "{}"), ("b", "{}")])
    batches.end_line(held, 1, "completed", "{}")
    assert not batches.to_finalizing(held)
    batches.start_line(held, 2, "u")
    assert not batches.to_finalizing(held)
    batches.end_line(held, 2, "failed", "{}")
    assert batches.to_finalizing(held)
    assert batches.get(made.id, "p").status == "finalizing"


def test_a_clock_that_is_ahead_takes_over_no_batch(database, monkeypatch):
    make(database, 1)
    ours, theirs = BatchStore(database), BatchStore(database)
    held = ours.claim("g1", 0.5)
    real = store_module.now_us
    for _ in range(8):  # longer than the lease
        monkeypatch.setattr(store_module, "now_us", lambda: real() + 3600_000_000)
        assert theirs.claim("g2", 0.5) is None
        monkeypatch.setattr(store_module, "now_us", real)
        assert ours.renew(held, 0.5) == "validating"
        time.sleep(0.1)
    assert theirs.claim("g2", 0.5) is None
    time.sleep(0.55)
    assert theirs.claim("g2", 0.5).fence == held.fence + 1
    assert ours.renew(held, 0.5) is None


def test_a_gateway_that_is_known_to_be_gone_is_not_waited_for(database):
    make(database, 1)
    batches = BatchStore(database)
    batches.claim("g1", 30.0)
    row = {"id": "g1", "host": "elsewhere", "pid": 1, "started_us": 1, "heartbeat_us": 1}
    with database.begin() as connection:
        connection.execute(gateways.insert().values(**row, state="running"))
    assert batches.claim("g2", 30.0) is None
    with database.begin() as connection:
        connection.execute(update(gateways).values(state="stopped"))
    assert batches.claim("g2", 30.0) is not None


def test_an_attempt_that_is_open_is_waited_for_and_then_not_paid_again(database):
    made, batches = make(database, 1), BatchStore(database)
    held = batches.claim("g1", 30.0)
    batches.begin(held, "m", [("0", '{"model":"m"}')])
    batches.start_line(held, 1, "first")
    batches.release(held)
    row = {
        "id": "first", "request_id": "r", "gateway_id": "g1", "org_id": "o", "project_id": "p",
        "key_id": "k", "endpoint": "e", "model": "m", "state": "open", "opened_us": 1,
        "is_stream": False, "batch_id": made.id,
    }  # fmt: skip
    with database.begin() as connection:
        connection.execute(usage.insert().values(**row))
    asked = []

    async def call(path, body, context):
        asked.append((context.usage_id, context.is_billed))
        return 200, {}, b"{}"

    async def main():
        running = asyncio.create_task(work(database, batches, call, made))
        await asyncio.sleep(1.0)
        assert asked == []
        with database.begin() as connection:
            connection.execute(update(usage).values(state="settled", reason="complete"))
        await running

    asyncio.run(main())
    assert asked == [("first", False)]


def test_lines_end_at_once_when_the_lease_is_lost(database):
    make(database, 3)
    batches, ended = BatchStore(database), []

    async def call(path, body, context):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(context.usage_id)

    async def main():
        worker = BatchWorker(
            FileStore(database), batches, call, gateway_id="g1", concurrency=3, lease_s=1.0
        )
        worker.start()
        await until(lambda: batches.next_lines(held_of(database), 0, 9)[-1:] != [])
        await until(
            lambda: all(one.usage_id for one in batches.next_lines(held_of(database), 0, 9))
        )
        with database.begin() as connection:
            connection.execute(update(store_module.batches).values(fence=99, lease_us=2**60))
        await until(lambda: len(ended) == 3, within_s=3)
        await until(lambda: not worker._working, within_s=3)
        await worker.stop()

    asyncio.run(main())


def held_of(database):
    with database.read() as connection:
        return connection.execute(select(store_module.batches)).one()


def test_lines_end_when_the_lease_cannot_be_renewed_in_time(database):
    make(database, 1)
    batches, ended = BatchStore(database), []
    renew, has_begun = batches.renew, []

    def renewing(held, lease_s):
        if has_begun:
            raise away()
        return renew(held, lease_s)

    batches.renew = renewing

    async def call(path, body, context):
        has_begun.append(time.monotonic())
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(time.monotonic())

    async def main():
        worker = BatchWorker(FileStore(database), batches, call, gateway_id="g1", lease_s=1.0)
        worker.start()
        await until(lambda: ended)
        batches.claim = lambda *_: None
        await worker.stop()

    asyncio.run(main())
    assert ended[0] - has_begun[0] < 5


def test_a_batch_that_cannot_be_given_back_still_stops(database):
    make(database, 1)
    batches = BatchStore(database)

    def refuses(held):
        raise away()

    batches.release = refuses
    asked = []

    async def call(path, body, context):
        asked.append(1)
        await asyncio.Event().wait()

    async def main():
        worker = BatchWorker(FileStore(database), batches, call, gateway_id="g1")
        worker.start()
        await until(lambda: asked)
        await asyncio.wait_for(worker.stop(), 10)

    asyncio.run(main())


def test_failing_the_rest_ends_when_the_batch_is_lost(database):
    made, batches = make(database, 2), BatchStore(database)
    held = batches.claim("g1", 30.0)
    batches.begin(held, "m", [("a", "{}"), ("b", "{}")])
    with database.begin() as connection:
        connection.execute(update(store_module.batches).values(fence=99))
    assert not batches.fail_rest(held, [(1, "{}"), (2, "{}")])
    assert not batches.to_finalizing(held)
    assert batches.get(made.id, "p").request_counts.failed == 0


def over(database, how, key):
    with database.begin() as connection:
        if how == "key_revoked":
            connection.execute(update(api_keys).values(revoked_us=1))
        elif how == "key_expired":
            connection.execute(update(api_keys).values(expires_us=1))
        elif how == "owner_disabled":
            connection.execute(update(projects).values(is_active=False))
        elif how == "organization":
            connection.execute(update(organizations).values(is_active=False))
        elif how == "key_scope_lost":
            connection.execute(update(api_keys).values(scopes='["inference"]'))
        elif how == "key_model_lost":
            connection.execute(update(api_keys).values(models='["other"]'))
        else:
            raise ValueError(how)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("key_revoked", "key_revoked"),
        ("key_expired", "key_expired"),
        ("owner_disabled", "owner_disabled"),
        ("organization", "owner_disabled"),
        ("key_scope_lost", "key_scope_lost"),
        ("key_model_lost", "key_model_lost"),
    ],
)
def test_a_batch_whose_key_lost_its_right_says_so_in_each_line_that_is_left(database, how, code):
    import_key(database, "sk-test-0123456789")
    with database.read() as connection:
        key = connection.execute(select(api_keys)).one()
    owner = Principal(key_id=key.id, org_id="o", project_id="p")
    made, batches = make(database, 4, owner), BatchStore(database)
    num_asked = 0

    async def call(path, body, context):
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            return 200, {}, b"{}"
        if num_asked == 2:
            await asyncio.to_thread(over, database, how, key)
        return 429, {"retry-after": "30"}, b"{}"

    asyncio.run(work(database, batches, call, made, status="cancelled", concurrency=1))
    found = batches.get(made.id, "p")
    assert (found.request_counts.completed, found.request_counts.failed) == (1, 3)
    lines = b"".join(FileStore(database).read(found.error_file_id)).splitlines()
    assert {json.loads(item)["error"]["code"] for item in lines} == {code}
    assert num_asked == 2


def test_a_line_that_was_paid_is_delivered_even_if_its_batch_is_cancelled(database):
    made, batches = make(database, 2), BatchStore(database)
    held = batches.claim("g1", 30.0)
    batches.begin(held, "m", [("a", '{"model":"m"}'), ("b", '{"model":"m"}')])
    batches.start_line(held, 1, "first")
    row = {
        "id": "first", "request_id": "r", "gateway_id": "g1", "org_id": "o", "project_id": "p",
        "key_id": "k", "endpoint": "e", "model": "m", "state": "settled", "reason": "complete",
        "opened_us": 1, "is_stream": False, "batch_id": made.id,
    }  # fmt: skip
    with database.begin() as connection:
        connection.execute(usage.insert().values(**row))
    batches.release(held)
    assert batches.ask_to_cancel(made.id, "p")
    asyncio.run(work(database, batches, billing(database), made, status="cancelled"))
    found, lines = delivered(database, made)
    assert lines == ["a"]
    assert found.request_counts.failed == 1
    assert paid(database) == ["first"]
