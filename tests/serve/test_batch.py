"""Files and batches through the official client, on a real database; crashes and takeovers."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest

from mxn.engine.echo import EchoEngine
from mxn.errors import OverloadedError
from mxn.ledger.database import Database
from mxn.ledger.keys import create_key, import_key
from mxn.ledger.tenants import ensure_default
from mxn.ledger.types import Principal
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import BatchRequest
from mxn.serve.batch.validate import MAX_LINES, check_lines
from mxn.serve.batch.worker import BatchWorker
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running

KEY = "sk-test-0123456789"
WAIT_S = 30.0


class Moody(EchoEngine):
    """Refuses every second request with what passes by itself."""

    num_asked = 0

    async def generate(self, request):
        self.num_asked += 1
        if self.num_asked % 2:
            raise OverloadedError("full", retry_after_s=0.01)
        async for delta in super().generate(request):
            yield delta


def served(engine, name="echo"):
    return ServedModel(name=name, client=engine, tokenizer=engine.tokenizer)


@pytest.fixture
def database(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db")
    import_key(database, KEY)
    return database


@pytest.fixture
def url(database):
    models = ServedModels(
        [served(EchoEngine()), served(Moody(), "moody"), served(EchoEngine(token_s=0.05), "slow")]
    )
    accounting = Accounting(Database(str(database.url)))
    with running(create_app(models, accounting=accounting)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def line(custom_id="a", *, model="echo", url="/v1/chat/completions", method="POST", **body):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
    } | body
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def run(client, lines, *, endpoint="/v1/chat/completions", wait=True):
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.status == "validating"
    return finished(client, batch) if wait else batch


def finished(client, batch):
    deadline_s = time.monotonic() + WAIT_S
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def results(client, file_id):
    return {
        item["custom_id"]: item
        for item in map(json.loads, client.files.content(file_id).text.splitlines())
    }


def rows(database):
    with database.read() as connection:
        from mxn.ledger.schema import usage

        return list(connection.execute(usage.select()))


def test_a_batch_runs_and_is_billed_once_for_each_line(client, database):
    batch = run(client, [line("a"), line("b", n=2), line("c")])
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 3, "completed": 3, "failed": 0}
    assert batch.error_file_id is None
    answers = results(client, batch.output_file_id)
    assert sorted(answers) == ["a", "b", "c"]
    made = sum(a["response"]["body"]["usage"]["completion_tokens"] for a in answers.values())
    assert made == 12
    assert batch.usage.output_tokens == made
    found = rows(database)
    assert len(found) == 3
    assert {row.state for row in found} == {"settled"}
    assert {row.batch_id for row in found} == {batch.id}
    assert sum(row.output_tokens for row in found) == made
    assert client.batches.list().data[0].id == batch.id


def test_what_passes_by_itself_is_waited_for(client, database):
    batch = run(client, [line(str(i), model="moody") for i in range(4)])
    assert batch.request_counts.completed == 4
    assert sum(row.output_tokens for row in rows(database)) == 12


def test_a_line_that_fails_stands_in_the_error_file(client):
    batch = run(client, [line("good"), line("bad", temperature=9)])
    assert batch.status == "completed"
    assert batch.request_counts.failed == 1
    wrong = results(client, batch.error_file_id)["bad"]
    assert wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["param"] == "temperature"
    assert list(results(client, batch.output_file_id)) == ["good"]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([line("a"), line("a")], "duplicate_custom_id"),
        ([line("a"), line("b", model="slow")], "mismatched_model"),
        ([line("a", method="GET")], "invalid_method"),
        ([line("a", url="/v1/embeddings")], "invalid_url"),
        ([line("a", stream=True)], "invalid_request"),
        (["{"], "invalid_json_line"),
        ([""], "empty_file"),
    ],
)
def test_a_file_that_is_wrong_fails_as_a_whole(client, lines, code, database):
    batch = run(client, lines)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == code
    if code != "empty_file":
        assert batch.errors.data[0].line == len(lines)
    assert rows(database) == []


def test_too_many_lines_are_refused():
    lines = (line(str(i)).encode() for i in range(MAX_LINES + 1))
    checked = check_lines(lines, "/v1/chat/completions")
    assert checked.errors[0].code == "too_many_requests"
    assert checked.errors[0].line == MAX_LINES + 1


def test_a_cancelled_batch_keeps_what_was_done(client):
    batch = run(client, [line(str(i), model="slow", max_tokens=8) for i in range(400)], wait=False)
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.05)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = finished(client, batch)
    assert batch.status == "cancelled"
    done = results(client, batch.output_file_id)
    left = results(client, batch.error_file_id)
    assert len(done) + len(left) == 400
    assert left
    assert next(iter(left.values()))["error"]["code"] == "batch_cancelled"


def test_files_are_a_projects_own(client, database, url):
    with database.begin() as connection:
        from mxn.ledger import tenants

        now = time.time_ns() // 1000
        default = ensure_default(connection, now_us=now)
        org = connection.execute(tenants.schema.projects.select()).first().org_id
        other = "proj_other"
        connection.execute(
            tenants.schema.projects.insert().values(
                id=other, org_id=org, name="other", created_us=now
            )
        )
        assert default != other
        _, key = create_key(connection, other, name="other", now_us=now)
    file = client.files.create(file=("a.txt", b"secret"), purpose="user_data")
    assert client.files.content(file.id).content == b"secret"
    assert client.files.retrieve(file.id).bytes == 6
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as stranger:
        time.sleep(0.6)  # what a gateway knows of keys may be half a second old
        with pytest.raises(openai.NotFoundError):
            stranger.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            stranger.files.delete(file.id)
        assert stranger.files.list().data == []
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_forms_that_are_wrong_are_refused(client, url):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/files", headers=headers, json={})
    assert answer.status_code == 400
    answer = httpx.post(f"{url}/v1/files", headers=headers, data={"purpose": "batch"}, files={})
    assert answer.status_code == 400
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a", b"x"), purpose="nonsense")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file-none", endpoint="/v1/completions", completion_window="24h"
        )


@pytest.mark.parametrize(
    "metadata", [{str(i): "" for i in range(17)}, {"k" * 65: ""}, {"k": "v" * 513}]
)
def test_metadata_has_limits(client, metadata):
    file = client.files.create(file=("in.jsonl", line().encode()), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="length"):
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h",
            metadata=metadata,
        )  # fmt: skip


def test_a_project_over_its_quota_of_bytes_is_told_so(database, monkeypatch):
    monkeypatch.setenv("MXN_PROJECT_FILE_BYTES", "1000")
    app = create_app(
        ServedModels([served(EchoEngine())]), accounting=Accounting(Database(str(database.url)))
    )
    with (
        running(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        client.files.create(file=("a", b"x" * 600), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="limit is 1000") as refused:
            client.files.create(file=("a", b"x" * 600), purpose="user_data")
        assert (refused.value.status_code, refused.value.code) == (400, "file_quota_exceeded")
        assert len(client.files.list().data) == 1


def test_lines_cut_off_by_a_restart_are_paid_once_and_what_failed_costs_nothing(database):
    """The gateway stops gracefully in the middle of its lines, and the next one goes on."""
    set_output_price(database)

    def serve(token_s):
        models = ServedModels([served(EchoEngine(token_s=token_s), "slow")])
        return running(create_app(models, accounting=Accounting(Database(str(database.url)))))

    words = [{"role": "user", "content": "hello there " * 8}]
    lines = [line(str(i), model="slow", max_tokens=60, messages=words) for i in range(3)]
    lines.append(line("bad", model="slow", temperature=9))
    with serve(0.05) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        batch = run(client, lines, wait=False)
        while client.batches.retrieve(batch.id).request_counts.failed != 1:
            time.sleep(0.05)
        time.sleep(0.4)  # lines are under way
    assert {row.cost_micro for row in rows(database)} == {0}, "nothing was delivered yet"
    assert {row.state for row in rows(database)} == {"settled"}
    assert len(rows(database)) == 3
    with serve(0.0) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        batch = finished(client, client.batches.retrieve(batch.id))
        answers = results(client, batch.output_file_id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    paid = {row.id: row for row in rows(database) if row.cost_micro}
    assert {answer["id"] for answer in answers.values()} == set(paid)
    for answer in answers.values():
        made = answer["response"]["body"]["usage"]["completion_tokens"]
        assert paid[answer["id"]].output_tokens == made > 0
    assert sum(row.cost_micro for row in rows(database)) == batch.usage.output_tokens
    assert batch.usage.output_tokens == sum(row.output_tokens for row in rows(database))


def set_output_price(database):
    """One micro-unit for each token of output."""
    from mxn.ledger.moments import now_us
    from mxn.ledger.prices import NewPrice, set_prices

    now = now_us()
    price = NewPrice(
        model="*", chip="*", kind="output", micro_per_million=1_000_000, currency="USD",
        valid_from_us=now,
    )  # fmt: skip
    with database.begin() as connection:
        set_prices(connection, [price], now_us=now)


def test_a_batch_whose_gateway_died_goes_on_and_bills_no_line_twice(database):
    """The first worker dies between answer and note, the second one takes the batch over."""
    files, batches = FileStore(database), BatchStore(database)
    owner = Principal(key_id="k", org_id="o", project_id="p")
    file = files.write(
        [line(str(i)).encode() + b"\n" for i in range(10)],
        owner=owner, filename="f", purpose="batch",
    )  # fmt: skip
    made = batches.create(
        BatchRequest(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
        owner,
    )
    billed: list[str] = []

    def caller(dies_at):
        async def call(path, body, context):
            if context.is_billed:
                billed.append(context.usage_id)
                settle(database, context.usage_id, made.id)
            if len(billed) == dies_at:
                await asyncio.Event().wait()  # settled, and nothing noted yet
            return 200, {}, b"{}"

        return call

    async def first():
        dying = BatchStore(database)
        dying.release = lambda held: None  # a killed process gives nothing back
        worker = BatchWorker(files, dying, caller(4), gateway_id="g1", concurrency=1, lease_s=1)
        worker.start()
        while len(billed) < 4:
            await asyncio.sleep(0.01)
        await worker.stop()
        assert batches.claim("g2", 5) is None, "the lease still holds"

    async def second():
        worker = BatchWorker(files, batches, caller(-1), gateway_id="g2", lease_s=1)
        worker.start()
        while batches.get(made.id, "p").status != "completed":
            await asyncio.sleep(0.05)
        await worker.stop()

    asyncio.run(first())
    asyncio.run(asyncio.wait_for(second(), WAIT_S))
    found = batches.get(made.id, "p")
    assert found.request_counts.completed == 10
    assert len(billed) == len(set(billed)) == 10
    out = b"".join(files.read(found.output_file_id)).splitlines()
    assert len({json.loads(item)["custom_id"] for item in out}) == 10


def settle(database, usage_id, batch_id):
    from mxn.ledger.schema import usage

    with database.begin() as connection:
        connection.execute(
            usage.insert().values(
                id=usage_id, request_id="r", gateway_id="g1", org_id="o", project_id="p",
                key_id="k", endpoint="e", model="m", state="settled", reason="complete",
                opened_us=1, settled_us=2, is_stream=False, batch_id=batch_id,
            )
        )  # fmt: skip
