"""How batches end: reserved budgets, answers of any form, cancels, lost replies."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import OperationalError

from mxn.ledger.database import Database
from mxn.ledger.schema import usage
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.tables_batch import batches as table
from mxn.ledger.types import OpenUsage, Principal, Settlement
from mxn.serve.batch import files as files_module
from mxn.serve.batch import lines as lines_module
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.lease import LeaseLostError
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import BatchRequest
from mxn.serve.batch.worker import BatchWorker
from mxn.serve.openai.errors import from_exception
from support.ledgers import make_tenant

URL = "/v1/completions"
OWNER = Principal(key_id="k", org_id="o", project_id="p")
ENDED = ("completed", "failed", "cancelled", "expired")


@pytest.fixture
def database(tmp_path):
    opened = Database.open(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


def make(database, num_lines, owner=OWNER):
    line = {"method": "POST", "url": URL, "body": {"model": "m"}}
    data = b"".join(
        json.dumps(line | {"custom_id": str(i)}).encode() + b"\n" for i in range(num_lines)
    )
    file = FileStore(database).write([data], owner=owner, filename="f", purpose="batch")
    request = BatchRequest(input_file_id=file.id, endpoint=URL, completion_window="24h")
    return BatchStore(database).create(request, owner)


def run(database, store, call, made, **options):
    """Work until the batch has ended; return it."""
    project = make_project(made, store)

    async def main():
        worker = BatchWorker(FileStore(database), store, call, gateway_id="g", **options)
        worker.start()
        deadline_s = time.monotonic() + 30
        while (found := store.get(made.id, project)).status not in ENDED:
            assert time.monotonic() < deadline_s, found
            await asyncio.sleep(0.05)
        await worker.stop()
        return found

    return asyncio.run(main())


def make_project(made, store):
    with store._database.read() as connection:
        query = table.select().where(table.c.id == made.id)
        return connection.execute(query).one().project_id


def text_of(database, file_id):
    return b"".join(FileStore(database).read(file_id)).decode()


async def fine(path, body, context):
    return 200, {}, b"{}"


def test_lines_that_wait_for_their_own_reservations_all_run(database):
    tenant = make_tenant(database)
    budget_tokens = 50_000  # twelve lines at once reserve it all, sixty use 6,600
    tenant.budget(budget_tokens)
    made, store = make(database, 60, tenant.principal), BatchStore(database)
    ledger = SqlLedger(database)

    async def call(path, body, context):
        try:
            ticket = await ledger.open(
                OpenUsage(
                    usage_id=context.usage_id, request_id="r", principal=tenant.principal,
                    endpoint=path, model="m", input_tokens=10, max_output_tokens=4096,
                )
            )  # fmt: skip
        except Exception as exc:
            error = from_exception(exc)
            return error.status, dict(error.headers), b"{}"
        await asyncio.sleep(0.02)
        await ledger.settle(
            ticket, Settlement(reason="complete", input_tokens=10, output_tokens=100)
        )
        return 200, {}, b"{}"

    found = run(database, store, call, made)
    assert (found.request_counts.completed, found.request_counts.failed) == (60, 0)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (json.dumps({"a": ["b\n", 1]}, indent=2).encode(), {"a": ["b\n", 1]}),
        (b"", ""),
        (b"<html>\n</html>", "<html>\n</html>"),
        (b"\xff", "\ufffd"),
        (b'{"a": 1}', {"a": 1}),
    ],
)
def test_a_result_is_one_line_whatever_was_answered(database, body, kept):
    async def call(path, given, context):
        return 502, {}, body

    found = run(database, BatchStore(database), call, make(database, 2))
    lines = text_of(database, found.error_file_id).split("\n")[:-1]
    assert [json.loads(line)["response"]["body"] for line in lines] == [kept, kept]


def test_a_cancel_while_the_file_is_checked_runs_nothing_and_names_every_line(database):
    made, store = make(database, 1200), BatchStore(database)
    lock, asked = store.lock, []

    def cancelling(connection, held):
        asked.append(1)
        if len(asked) == 2:
            change = update(table).values(status="cancelling", cancelling_us=1)
            connection.execute(change)
        return lock(connection, held)

    store.lock = cancelling
    called = []

    async def call(path, body, context):
        called.append(1)
        return 200, {}, b"{}"

    found = run(database, store, call, made)
    assert (found.status, called) == ("cancelled", [])
    assert (found.request_counts.total, found.request_counts.failed) == (1200, 1200)
    assert text_of(database, found.error_file_id).count("batch_cancelled") == 1200


def test_a_row_that_stays_open_does_not_hold_a_cancelled_batch(database, monkeypatch):
    monkeypatch.setattr(lines_module, "_PAID_PATIENCE_S", 0.5)
    made, store = make(database, 1), BatchStore(database)
    held = store.claim("gone", 30.0)
    store.begin(held, "m", [("0", '{"model":"m"}')])
    store.start_line(held, 1, "first")
    store.release(held)
    row = {
        "id": "first", "request_id": "r", "gateway_id": "g9", "org_id": "o", "project_id": "p",
        "key_id": "k", "endpoint": "e", "model": "m", "state": "open", "opened_us": 1,
        "is_stream": False,
    }  # fmt: skip
    with database.begin() as connection:
        connection.execute(insert(usage).values(**row))
    store.ask_to_cancel(made.id, "p")
    found = run(database, store, fine, made)
    assert (found.status, found.request_counts.failed) == ("cancelled", 1)


def test_files_of_attempts_that_could_not_finish_are_removed(database):
    made, store = make(database, 2), BatchStore(database)
    finish, left = store.finish, [2]

    def failing(*arguments):
        if left[0]:
            left[0] -= 1
            raise OperationalError("UPDATE", {}, Exception("away"))
        return finish(*arguments)

    store.finish = failing
    found = run(database, store, fine, made, lease_s=0.5)
    files, _ = FileStore(database).page("p", purpose="batch_output")
    assert [file.id for file in files] == [found.output_file_id]


def test_a_batch_whose_lines_all_ran_is_completed_however_late(database):
    made, store = make(database, 2), BatchStore(database)
    with database.begin() as connection:
        soon = time.time_ns() // 1000 + 500_000
        connection.execute(update(table).values(expires_us=soon))

    async def call(path, body, context):
        await asyncio.sleep(1.0)
        return 200, {}, b"{}"

    found = run(database, store, call, made)
    assert (found.status, found.request_counts.completed) == ("completed", 2)


def test_an_expired_batch_stays_expired_when_its_end_is_interrupted(database):
    made, store = make(database, 3), BatchStore(database)
    held = store.claim("gone", 30.0)
    store.begin(held, "m", [(str(i), '{"model":"m"}') for i in range(3)])
    with database.begin() as connection:
        connection.execute(update(table).values(expires_us=1))
    store.fail_rest(held, [(i, "{}") for i in (1, 2, 3)], is_expired=True)
    store.release(held)
    assert run(database, store, fine, made).status == "expired"


def test_a_gateway_that_lost_its_batch_leaves_the_files_alone(database):
    made, store = make(database, 2), BatchStore(database)
    stale = store.claim("paused", 30.0)
    store.release(stale)
    found = run(database, store, fine, made)
    worker = BatchWorker(FileStore(database), store, fine, gateway_id="paused")
    with pytest.raises(LeaseLostError):
        worker._write(stale, "completed")
    assert text_of(database, found.output_file_id).count("\n") == 2


def test_files_are_cut_into_chunks_without_copying_them_again_and_again(monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK_BYTES", 10)
    parts = [b"a" * 3, b"b" * 25, b"", b"c" * 2, b"d" * 10]
    chunks = list(files_module._chunks(parts))
    assert b"".join(chunks) == b"".join(parts)
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 10]
    assert list(files_module._chunks([])) == []
