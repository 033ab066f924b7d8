"""Files and lines are written in short transactions, and what a crash leaves is removed."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import func, select, text, update

from mxn.errors import CapacityError
from mxn.ledger.database import Database
from mxn.ledger.keys import import_key
from mxn.ledger.schema import api_keys
from mxn.ledger.tables_batch import batch_lines, file_chunks, files
from mxn.ledger.types import Principal
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import BatchRequest

OWNER = Principal(key_id="k", org_id="o", project_id="p")
PART = b"x" * (1 << 20)


@pytest.fixture
def database(tmp_path):
    return Database.open(f"sqlite:///{tmp_path}/ledger.db")


def count(database, table):
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def upload(store, parts):
    return store.write(parts, owner=OWNER, filename="f", purpose="batch")


def test_others_write_while_a_file_is_stored_and_nobody_sees_half_of_it(database):
    other, store, seen = Database(str(database.url)), FileStore(database), []

    def parts():
        for _ in range(3):
            yield PART
            with other.begin() as connection:  # would wait for ever for a lock held by the upload
                connection.execute(text("PRAGMA busy_timeout=100"))
                connection.execute(text("UPDATE files SET filename = filename"))
            seen.append(store.page("p")[0])

    made = upload(store, parts())
    assert seen == [[], [], []]
    assert store.get(made.id, "p").bytes == 3 << 20
    assert b"".join(store.read(made.id)) == PART * 3


def test_an_upload_that_breaks_off_leaves_nothing(database):
    def parts():
        yield PART
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        upload(FileStore(database), parts())
    assert count(database, files) == count(database, file_chunks) == 0


def test_what_a_killed_process_left_is_removed_after_its_time(database):
    store = FileStore(database)
    made = upload(store, [PART])
    with database.begin() as connection:
        connection.execute(update(files).values(status="uploading"))
    assert store.delete_expired() == 0
    with database.begin() as connection:
        connection.execute(update(files).values(created_us=1))
    assert store.delete_expired() == 1
    assert store.get(made.id, "p") is None
    assert count(database, files) == count(database, file_chunks) == 0


def test_a_project_keeps_no_more_bytes_than_it_may(database):
    store = FileStore(database, max_project_bytes=3 << 20)
    first = upload(store, [PART, PART])
    with pytest.raises(CapacityError, match=f"limit is {3 << 20}"):
        upload(store, [PART, PART])
    assert count(database, files) == 1
    store.delete(first.id, "p")
    assert count(database, file_chunks) == 0
    assert upload(store, [PART, PART]).bytes == 2 << 20


def test_lines_whose_gateway_died_while_it_entered_them_are_entered_once(database):
    batches = BatchStore(database)
    file = upload(FileStore(database), [b"x"])
    request = BatchRequest(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    made = batches.create(request, OWNER)
    lines = [(str(i), json.dumps({"model": "m", "n": i})) for i in range(1200)]
    dead = batches.claim("g1", 0.0)
    begin, entered = database.begin, []

    def dies():
        entered.append(1)
        if len(entered) == 3:
            raise OSError("killed")
        return begin()

    database.begin = dies
    with pytest.raises(OSError, match="killed"):
        batches.begin(dead, "m", lines)
    database.begin = begin
    assert count(database, batch_lines) == 1000
    assert batches.claim("g2", 0.0) is None, "its lease must be seen to stand still"
    held = batches.claim("g2", 0.0)
    assert held.status == "validating"
    assert not batches.begin(dead, "m", lines), "the batch is another gateway's"
    assert batches.begin(held, "m", lines)
    assert count(database, batch_lines) == 1200
    assert batches.get(made.id, "p").request_counts.total == 1200


@pytest.mark.parametrize("field", ["revoked_us", "expires_us"])
def test_a_batch_is_cancelled_when_its_key_is_over(database, field):
    import_key(database, "sk-test-0123456789")
    with database.read() as connection:
        key = connection.execute(select(api_keys)).one()
    owner = Principal(key_id=key.id, org_id="o", project_id=key.project_id)
    file = upload(FileStore(database), [b"x"])
    request = BatchRequest(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    batches = BatchStore(database)
    batches.create(request, owner)
    held = batches.claim("g", 30.0)
    assert batches.renew(held, 30.0) == "validating"
    with database.begin() as connection:
        connection.execute(update(api_keys).values({field: 1}))
    assert batches.renew(held, 30.0) == "cancelling"
