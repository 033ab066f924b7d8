"""What a batch refuses at its border, and how batches of several projects share a gateway."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from mxn.ledger.database import Database
from mxn.ledger.types import Principal
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.routes import _expires_s, page_limit, path_id, without_nul
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import BatchRequest
from mxn.serve.batch.validate import check_lines
from mxn.serve.batch.worker import BatchWorker
from mxn.serve.openai.errors import ApiError

URL = "/v1/completions"


@pytest.fixture
def database(tmp_path):
    return Database.open(f"sqlite:///{tmp_path}/ledger.db")


def owner(project):
    return Principal(key_id=f"key-{project}", org_id="o", project_id=project)


def line(custom_id="a", **body):
    body = {"model": "m"} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body}).encode()


def make(database, project, num_lines):
    data = b"".join(line(str(i)) + b"\n" for i in range(num_lines))
    file = FileStore(database).write([data], owner=owner(project), filename="f", purpose="batch")
    request = BatchRequest(input_file_id=file.id, endpoint=URL, completion_window="24h")
    return BatchStore(database).create(request, owner(project))


@pytest.mark.parametrize("size", [9, 10, 11, 25])
def test_lines_are_cut_one_byte_behind_the_limit(database, size):
    parts = [b"ab\n" + b"x" * size + b"\n\nlast"]
    files = FileStore(database)
    file = files.write(parts, owner=owner("p"), filename="f", purpose="batch")
    assert list(files.lines(file.id, 10)) == [b"ab", b"x" * min(size, 11), b"", b"last"]


def test_a_line_over_the_limit_is_refused_by_its_number():
    checked = check_lines([line("a"), line("b", prompt="x" * 200)], URL, max_line_bytes=200)
    assert [(e.code, e.line) for e in checked.errors] == [("line_too_long", 2)]
    assert "200" in checked.errors[0].message


def test_a_long_line_is_not_taken_apart():
    body = b'{"model":"m","x":[' + b"[]," * 3_000_000 + b"[]]}"
    head = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":'
    began_s = time.perf_counter()
    checked = check_lines([head + body + b"}"], URL)
    assert time.perf_counter() - began_s < 5
    assert checked.lines == [("a", body.decode())]


def test_messages_repeat_little_of_what_a_client_wrote():
    long = "m" * 100_000
    checked = check_lines([line("a"), line("b", model=long)], URL)
    assert checked.errors[0].code == "mismatched_model"
    assert len(checked.errors[0].message) < 300


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (line("a\0b"), "invalid_custom_id"),
        (line("a", model="m\0"), "model_required"),
        (line("a", model=5), "model_required"),
        (line("a", stream=True), "invalid_request"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":[1]}',
         "invalid_json_line"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"\xff"}}',
         "invalid_json_line"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_stored_or_run_is_refused(given, code):
    assert [error.code for error in check_lines([given], URL).errors] == [code]


def test_inputs_of_embeddings_are_counted():
    def asked(value):
        given = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings",
                 "body": {"model": "m", "input": value}}  # fmt: skip
        return check_lines([json.dumps(given).encode()], "/v1/embeddings").errors

    assert asked([1] * 60_000) == []
    assert asked(["x"] * 60_000)[0].code == "too_many_requests"


@pytest.mark.parametrize(("value", "codes"), [(True, ["invalid_request"]), (False, []), (None, [])])
def test_a_line_of_responses_does_not_run_in_the_background(value, codes):
    body = {"model": "m", "input": "x", "background": value}
    given = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    errors = check_lines([json.dumps(given).encode()], "/v1/responses").errors
    assert [error.code for error in errors] == codes
    assert [error.param for error in errors] == ["body.background"] * len(codes)


def request(**scope):
    return Request({"type": "http", "headers": [], "query_string": b"", **scope})


@pytest.mark.parametrize("limit", ["9" * 5000, "²", "0", "-1", "x"])
def test_a_number_that_is_none_is_the_clients_mistake(limit):
    query = f"limit={limit}".encode()
    with pytest.raises(ApiError, match="limit is from 1"):
        page_limit(request(query_string=query), 20, largest=100)
    with pytest.raises(ApiError, match="expires_after"):
        _expires_s({"expires_after[seconds]": limit})


def test_nul_stops_at_the_border():
    with pytest.raises(ApiError) as found:
        path_id(request(path_params={"file_id": "a\0"}), "file_id", "file")
    assert found.value.status == 404
    with pytest.raises(ApiError, match="filename"):
        without_nul("a\0", "filename")


async def until(condition, *, within_s=8.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


def test_a_tenant_at_its_limit_blocks_nobody_and_its_batch_can_be_cancelled(database):
    stuck, free = make(database, "a", 3), make(database, "b", 1)
    batches = BatchStore(database)
    asked = SimpleNamespace(a=0)

    async def call(path, body, context):
        if context.principal.project_id == "b":
            return 200, {}, b"{}"
        asked.a += 1
        return 429, {"retry-after": "30"}, b"{}"

    async def main():
        worker = BatchWorker(FileStore(database), batches, call, gateway_id="g")
        worker.start()
        try:
            await until(lambda: asked.a == 3)
            await until(lambda: batches.get(free.id, "b").status == "completed")
            assert batches.get(stuck.id, "a").status == "in_progress"
            assert batches.ask_to_cancel(stuck.id, "a")
            await until(lambda: batches.get(stuck.id, "a").status == "cancelled")
        finally:
            await worker.stop()

    asyncio.run(main())
    assert batches.get(stuck.id, "a").request_counts.failed == 3


def test_places_go_to_the_project_that_has_fewest(database):
    made = [make(database, project, 1) for project in ("a", "a", "a", "b")]
    batches = BatchStore(database)
    first = batches.claim("g", 30, {}, 2)
    second = batches.claim("g", 30, {"a": 1}, 2)
    assert [first.id, second.id] == [made[0].id, made[3].id]
    third = batches.claim("g", 30, {"a": 1, "b": 1}, 2)
    assert third.id == made[1].id
    assert batches.claim("g", 30, {"a": 2, "b": 1}, 2) is None
