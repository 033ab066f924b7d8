"""Answers in the background: their states, their end with the server, their bound, their price."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import time
from contextlib import contextmanager

import httpx
import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import OperationalError

from mxn.engine.echo import EchoEngine
from mxn.ledger import schema
from mxn.ledger.database import Database
from mxn.ledger.keeper import this_host
from mxn.ledger.tables_responses import responses
from mxn.serve import metering
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.responses.background import MAX_UNDER_WAY, Background
from mxn.serve.responses.store import SqlStore, Stored
from mxn.serve.responses.takeover import Abandoned
from mxn.serve.responses.types import Response
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from support.gateways import gateway
from support.ledgers import make_tenant, row_of
from support.server import gateway_process

_numbers = itertools.count()


@pytest.fixture
def tenant(database):
    tenant = make_tenant(database)
    tenant.price("input", 1_000_000)
    tenant.price("output", 2_000_000)
    return tenant


class Client:
    def __init__(self, url, tenant):
        headers = {"authorization": f"Bearer {tenant.key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=20)

    def begin(self, **more):
        body = {"model": "echo", "input": "hello there", "background": True,
                "max_output_tokens": 4} | more  # fmt: skip
        return self._client.post("/v1/responses", json=body)

    def get(self, name):
        return self._client.get(f"/v1/responses/{name}").json()

    def cancel(self, name):
        return self._client.post(f"/v1/responses/{name}/cancel").json()

    def delete(self, name):
        return self._client.delete(f"/v1/responses/{name}")

    def until(self, name, *wanted, limit_s=15):
        until_s = time.monotonic() + limit_s
        while (found := self.get(name))["status"] not in wanted:
            assert time.monotonic() < until_s, found
            time.sleep(0.02)
        return found


@contextmanager
def serving(database, tenant, **engine):
    echo = EchoEngine(**engine)
    models = ServedModels([ServedModel(name="echo", client=echo, tokenizer=echo.tokenizer)])
    app = create_app(models, accounting=Accounting(Database(str_of(database))))
    with running(app) as url:
        yield Client(url, tenant)


def str_of(database):
    return database.url.render_as_string(hide_password=False)


def stored_in(database, name):
    with database.read() as connection:
        return connection.execute(select(responses).where(responses.c.id == name)).one()


def until(check, limit_s=10):
    until_s = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_queued_becomes_in_progress_and_then_what_was_paid_for(database, tenant):
    with serving(database, tenant, first_token_s=0.2, token_s=0.2) as client:
        made = client.begin().json()
        assert made["status"] == "queued"
        client.until(made["id"], "in_progress")
        assert row_of(database, made["id"]).state == "open"
        done = client.until(made["id"], "incomplete")
        until(lambda: row_of(database, made["id"]).state != "open")
    row = row_of(database, made["id"])
    assert (row.reason, row.output_tokens) == ("complete", 4)
    assert row.cost_micro == done["usage"]["input_tokens"] + 2 * 4
    assert stored_in(database, made["id"]).owner is None


def test_a_server_that_stops_makes_what_is_under_way_final(database, tenant):
    with serving(database, tenant, token_s=0.2) as client:
        made = [client.begin(max_output_tokens=500).json()["id"] for _ in range(3)]
        client.until(made[0], "in_progress")
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 8
    for name in made:
        found = SqlStore(database).get(name, tenant.principal.project_id).response
        assert found.status == "failed"
        assert "server stopped" in found.error.message
        row = row_of(database, name)
        assert row is None or row.state != "open"


def test_one_that_is_cancelled_before_its_first_step_is_final_too(database, tenant):
    with serving(database, tenant, first_token_s=5.0) as client:
        made = client.begin().json()
        assert client.cancel(made["id"])["status"] == "cancelled"
        assert client.get(made["id"])["status"] == "cancelled"
        until(lambda: (row := row_of(database, made["id"])) is None or row.cost_micro == 0)


def test_what_was_cancelled_is_neither_paid_nor_read(database, tenant):
    with serving(database, tenant, token_s=0.05) as client:
        name = client.begin(max_output_tokens=500).json()["id"]
        client.until(name, "in_progress")
        time.sleep(0.5)
        assert client.cancel(name)["status"] == "cancelled"
        found = client.get(name)
        assert (found["output"], found["usage"]) == ([], None)
        until(lambda: row_of(database, name).state != "open")
    assert row_of(database, name).cost_micro == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_stored_is_delivered_all_the_same(
    database, tenant, monkeypatch, stream
):
    def refuses(self, project, stored):
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(SqlStore, "put", refuses)
    with serving(database, tenant) as client:
        answer = client.begin(background=False, stream=stream)
        assert answer.status_code == 200
        if stream:
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            found = json.loads(events[-1])["response"]
        else:
            found = answer.json()
        assert found["status"] == "incomplete"
        assert found["store"] is False
        assert found["usage"]["output_tokens"] == 4


def test_another_server_can_cancel_and_delete(database, tenant):
    with serving(database, tenant, token_s=0.2) as one, serving(database, tenant) as other:
        names = [one.begin(max_output_tokens=500).json()["id"] for _ in range(2)]
        for name in names:
            one.until(name, "in_progress")
        assert other.cancel(names[0])["status"] == "cancelled"
        assert other.delete(names[1]).status_code == 200
        for name in names:  # whoever makes it stops, and takes no money
            until(lambda name=name: row_of(database, name).state != "open", limit_s=12)
            assert row_of(database, name).cost_micro == 0
        assert one.get(names[0])["status"] == "cancelled"


def test_what_a_killed_server_left_is_failed_by_another(database, tenant, tmp_path):
    far = EchoEngine(token_s=0.2)
    models = ServedModels([ServedModel(name="echo", client=far, tokenizer=far.tokenizer)])
    with running(create_app(models)) as far_url:
        options = ("--replica", f"echo={far_url}", "--database", str_of(database))
        with gateway_process(tmp_path, *options) as (url, process, _):
            client = Client(url, tenant)
            until(lambda: client.begin(background=False).status_code == 200)
            name = client.begin(max_output_tokens=500).json()["id"]
            client.until(name, "in_progress")
            process.kill()
            process.wait()
    assert stored_in(database, name).owner is not None
    with serving(database, tenant) as client:
        found = client.until(name, "failed")
        assert found["error"]["code"] == "server_error"
        assert "ended before it was done" in found["error"]["message"]
        until(lambda: row_of(database, name).state != "open")
    assert row_of(database, name).cost_micro == 0
    assert stored_in(database, name).owner is None


def test_answers_of_living_servers_and_ours_are_left_alone(database):
    now = time.time_ns() // 1000
    with database.begin() as connection:
        for name, pid in (("alive", 1), ("me", 1)):
            values = {"id": name, "host": "elsewhere/x/1", "pid": pid, "started_us": now,
                      "heartbeat_us": now, "state": "running"}  # fmt: skip
            connection.execute(insert(schema.gateways).values(**values))
    for owner in ("alive", "me", "never-registered"):
        response = Response(id=owner, created_at=0.0, status="queued", model="m")
        SqlStore(database, gateway_id=owner).put("p", Stored(response=response, input=[]))
    abandoned = Abandoned(database, "me", lost_after_s=0.2)
    status = lambda name: SqlStore(database).get(name, "p").response.status  # noqa: E731
    for beat in range(5):
        with database.begin() as connection:
            change = update(schema.gateways).where(schema.gateways.c.id == "alive")
            connection.execute(change.values(heartbeat_us=now + beat))
        abandoned.sweep({"me"})
        time.sleep(0.1)
    assert (status("alive"), status("me")) == ("queued", "queued")
    assert status("never-registered") == "failed"
    for _ in range(5):  # its heart stands still, and ours is not known here any more
        abandoned.sweep(())
        time.sleep(0.1)
    assert (status("alive"), status("me")) == ("failed", "failed")
    late = Response(id="alive", created_at=0.0, status="completed", model="m")
    assert not SqlStore(database, gateway_id="alive").replace("p", late)  # it came back too late
    assert status("alive") == "failed"


def test_a_gateway_of_this_machine_that_is_gone_is_seen_at_once(database):
    with database.begin() as connection:
        values = {"id": "gone", "host": this_host(), "pid": 2**22 + 1, "started_us": 1,
                  "heartbeat_us": 1, "state": "running"}  # fmt: skip
        connection.execute(insert(schema.gateways).values(**values))
    response = Response(id="one", created_at=0.0, status="in_progress", model="m")
    SqlStore(database, gateway_id="gone").put("p", Stored(response=response, input=[]))
    Abandoned(database, "me").sweep(())
    assert SqlStore(database).get("one", "p").response.status == "failed"


def test_a_project_has_a_bound(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db")
    tenant, other = make_tenant(database), make_tenant(database, "other")
    with serving(database, tenant, first_token_s=30.0) as client:
        made = [client.begin().json()["id"] for _ in range(MAX_UNDER_WAY)]
        refused = client.begin()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "too_many_background_responses"
        client._client.headers["authorization"] = f"Bearer {other.key}"
        assert client.begin().status_code == 200
        client._client.headers["authorization"] = f"Bearer {tenant.key}"
        client.cancel(made[0])
        assert client.begin().status_code == 200
        assert client.begin(model="nobody").status_code == 429
    database.close()


def test_a_place_is_free_again_after_a_refusal(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db")
    tenant = make_tenant(database)
    with serving(database, tenant) as client:
        for _ in range(MAX_UNDER_WAY + 1):
            assert client.begin(model="nobody").status_code == 404
        assert client.begin().status_code == 200
    database.close()


class Away:
    """Makes the final state of answers impossible to store while `is_away`."""

    def __init__(self, monkeypatch):
        self.is_away, self.num_refused = True, 0
        whole = SqlStore.replace

        def replace(store, project_id, response):
            if self.is_away and response.status != "in_progress":
                self.num_refused += 1
                raise OperationalError("UPDATE", {}, Exception("away"))
            return whole(store, project_id, response)

        monkeypatch.setattr(SqlStore, "replace", replace)


def test_an_answer_is_paid_when_it_can_be_read_and_not_before(database, tenant, monkeypatch):
    away = Away(monkeypatch)
    with serving(database, tenant) as client:
        name = client.begin().json()["id"]
        until(lambda: away.num_refused > 1)
        assert row_of(database, name).state == "open"
        assert client.get(name)["status"] == "in_progress"
        away.is_away = False
        client.until(name, "incomplete")
        until(lambda: row_of(database, name).state != "open")
    assert row_of(database, name).cost_micro > 0


def test_that_of_a_foreign_server_is_paid_no_sooner(tmp_path, monkeypatch):
    away = Away(monkeypatch)
    with gateway(tmp_path) as gate:
        client = Client(gate.url, gate.tenant)
        name = client.begin(model="far").json()["id"]
        until(lambda: away.num_refused > 1)
        assert row_of(gate.tenant.database, name).state == "open"
        away.is_away = False
        client.until(name, "incomplete")
        until(lambda: row_of(gate.tenant.database, name).state != "open")
        row = row_of(gate.tenant.database, name)
        assert (row.reason, row.output_tokens) == ("complete", 4)
        # Counted once, although the settlement came later.
        assert gate.value("mxn_tokens_total", kind="output", model="far", chip="chip-c") == 4


def test_an_answer_that_could_never_be_stored_costs_nothing(database, tenant, monkeypatch):
    away = Away(monkeypatch)
    monkeypatch.setattr(Background.stop, "__defaults__", (0.5,))
    with serving(database, tenant) as client:
        name = client.begin().json()["id"]
        until(lambda: away.num_refused > 1)
    assert row_of(database, name).state == "open"
    with serving(database, tenant) as client:
        assert client.until(name, "failed")["error"]["code"] == "server_error"
        until(lambda: row_of(database, name).state != "open")
    assert row_of(database, name).cost_micro == 0


def test_what_was_deleted_meanwhile_costs_nothing(database, tenant):
    with serving(database, tenant, token_s=0.1) as client:
        name = client.begin(max_output_tokens=100).json()["id"]
        client.until(name, "in_progress")
        assert client.delete(name).status_code == 200
        until(lambda: row_of(database, name).state != "open")
    assert row_of(database, name).cost_micro == 0


def test_a_lost_answer_of_the_database_is_no_lost_answer_of_ours(database):
    store = SqlStore(database, gateway_id="me")
    response = Response(id="one", created_at=0.0, status="queued", model="m")
    store.put("p", Stored(response=response, input=[]))
    response.status = "completed"
    assert store.replace("p", response)
    assert store.replace("p", response)  # it had been written, and is tried again
    response.status = "failed"
    assert not store.replace("p", response)


def test_the_end_of_a_server_waits_for_settlements_with_a_limit(caplog):
    async def scenario():
        stuck = asyncio.ensure_future(asyncio.Event().wait())
        metering._settling.add(stuck)
        try:
            begun_s = time.monotonic()
            assert await metering.settled(0.1) == 1
            assert time.monotonic() - begun_s < 2
        finally:
            metering._settling.discard(stuck)
            stuck.cancel()
        assert await metering.settled(0.1) == 0

    asyncio.run(scenario())
    assert "1 usage rows" in caplog.text
