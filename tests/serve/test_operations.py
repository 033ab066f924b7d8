"""What operators ask of a gateway: health, load, models, and a line in the log for each request."""

from __future__ import annotations

import io
import json
from datetime import datetime

import httpx
import pytest

from mxn.engine.echo import EchoEngine
from mxn.ledger.database import Database
from mxn.serve.app import create_app
from mxn.serve.fleet import Replica
from mxn.serve.logs import RequestLog
from mxn.serve.pooled import PooledClient
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.settings import ServeSettings
from mxn.serve.state import State
from mxn.serve.status import replica_rows
from support.gateways import gateway
from support.ledgers import make_tenant
from support.server import gateway_process

SECRET = "the launch code is zebra"
FIELDS = {
    "time", "at", "request_id", "method", "path", "status", "reason", "refusal", "is_stream",
    "took_ms", "own_ms", "queue_ms", "ledger_ms", "model", "org", "project", "key", "replicas",
    "chips", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_micro",
    "currency", "batch",
}  # fmt: skip


def test_without_an_admin_key_nobody_sees_money_or_addresses(tmp_path):
    with gateway(tmp_path) as served:
        served.chat("echo")
        served.chat("far")
        private = ("mxn_cost_micro_total{", "mxn_replica_up{")
        shown = served.get("/metrics").text
        hidden = httpx.get(f"{served.url}/metrics").text
        assert all(name in shown for name in private)
        assert not any(name in hidden for name in private)
        assert served.tenant.principal.org_id not in hidden
        assert "mxn_requests_total{" in hidden
        health = httpx.get(f"{served.url}/health")
        assert health.status_code == 200
        assert "replicas" not in health.json()["models"]["echo"]
        wrong = httpx.get(f"{served.url}/metrics", headers={"authorization": "Bearer sk-wrong"})
        assert wrong.status_code == 401


def test_health_and_load_show_every_replica(tmp_path):
    with gateway(tmp_path) as served:
        served.chat("far")
        health = served.get("/health")
        assert health.status_code == 200
        assert health.json()["models"]["echo"]["replicas"] == [
            {"name": "echo-0", "chip": "chip-a", "state": "up"},
            {"name": "echo-1", "chip": "chip-b", "state": "up"},
        ]
        served.engines[0].die()
        health = served.get("/health")
        assert health.status_code == 200, "the other one answers"
        states = {r["name"]: r["state"] for m in health.json()["models"].values()
                  for r in m["replicas"]}  # fmt: skip
        assert states == {"echo-0": "down", "echo-1": "up", "gone": "failing", "works": "up"}
        served.pool.drain("echo-1")
        load = served.get("/load").json()
        assert load["server_load"] == 0
        assert set(load["models"]) == {"echo", "far"}
        found = {row["name"]: row for row in load["replicas"]}
        assert found["echo-1"] == {
            "model": "echo", "name": "echo-1", "chip": "chip-b", "state": "draining",
            "running": 0, "waiting": 0, "kv_used": 0.0, "tokens": 0, "lost": 0,
        }  # fmt: skip
        assert (found["works"]["tokens"], found["works"]["waiting"]) == (8, None)


def test_a_replica_that_failed_in_a_row_or_flapped_is_not_up():
    engines = [EchoEngine(), EchoEngine()]
    replicas = [Replica(id=f"r{at}", client=engine) for at, engine in enumerate(engines)]
    pool = PooledClient(replicas, clock=lambda: 0.0)
    failing, held = pool.seats()
    for _ in range(3):
        failing.breaker.failed(pool.now_s)
    held.health.bad(pool.now_s, is_fatal=True)
    model = ServedModel(name="echo", client=pool, tokenizer=engines[0].tokenizer)
    state = State(ServedModels([model]), ServeSettings())
    assert [row.state for row in replica_rows(state)] == ["failing", "held"]


def test_models_of_foreign_servers_are_listed(tmp_path):
    with gateway(tmp_path) as served:
        cards = {card["id"]: card for card in served.get("/v1/models").json()["data"]}
        assert set(cards) == {"echo", "far"}
        far = cards["far"]
        assert (far["kind"], far["family"], far["chips"]) == ("foreign", "openai", ["chip-c"])
        assert far["max_model_len"] is None, "nobody asked the server"
        assert served.get("/v1/models/far").json() == far
        answer = served.get("/v1/models/nope")
        assert answer.status_code == 404
        assert "far" in answer.json()["error"]["message"]


def test_a_line_says_who_what_how_long_and_how_much(tmp_path):
    out = io.StringIO()
    with gateway(tmp_path, on_end=[RequestLog(out)]) as served:
        usage = served.chat(text=SECRET, stream=False).json()["usage"]
        served.chat(text=SECRET, stream=True, headers={"x-request-id": "mine"})
        served.chat(text=SECRET, temperature="hot")
        httpx.get(f"{served.url}/v1/models", headers={"authorization": "Bearer sk-wrong-one"})
        served.chat("far", text=SECRET)
        who = served.tenant.principal
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 401, 200]
    assert all(set(line) == FIELDS for line in lines)
    whole, stream, bad, unknown, far = lines
    assert (whole["reason"], whole["is_stream"], whole["refusal"]) == ("complete", False, None)
    assert (stream["request_id"], stream["is_stream"]) == ("mine", True)
    assert whole["input_tokens"] == usage["prompt_tokens"]
    assert whole["output_tokens"] == usage["completion_tokens"] == 8
    assert whole["cost_micro"] == usage["prompt_tokens"] + 16
    assert (whole["currency"], whole["key"], whole["org"]) == ("USD", who.key_id, who.org_id)
    assert whole["took_ms"] >= whole["own_ms"] > 0
    assert 0 < whole["ledger_ms"] < whole["took_ms"]
    assert abs(datetime.fromisoformat(whole["at"]).timestamp() - whole["time"]) < 0.002
    assert (bad["reason"], bad["cost_micro"], bad["replicas"]) == (None, 0, [])
    assert (unknown["org"], unknown["key"]) == (None, None)
    assert (far["model"], far["replicas"], far["chips"][-1]) == ("far", ["gone", "works"], "chip-c")
    check_holds_no_secret(out.getvalue(), served.tenant.key)


class Full(io.StringIO):
    """A file on a disk that is full at first."""

    num_refused = 0

    def write(self, text):
        if self.num_refused < 2:
            self.num_refused += 1
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_log_that_cannot_be_written_fails_no_request_and_says_so_later():
    out = Full()
    engine = EchoEngine()
    model = ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)
    with running(create_app(ServedModels([model]), on_end=[RequestLog(out)])) as url:
        for _ in range(4):
            assert httpx.get(f"{url}/version").status_code == 200
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.get("lost_lines") for line in lines] == [2, None]


def check_holds_no_secret(text, key):
    assert "zebra" not in text
    assert "launch" not in text
    assert key not in text
    assert key.removeprefix("sk-")[:12] not in text
    assert "sk-" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_real_gateway_logs_neither_prompts_nor_keys(tmp_path, stream):
    tenant = make_tenant(Database.open(f"sqlite:///{tmp_path}/ledger.db"))
    engine = EchoEngine()
    far = ServedModels([ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)])
    with running(create_app(far)) as url:
        options = ("--replica", f"echo={url}", "--log-format", "json",
                   "--database", f"sqlite:///{tmp_path}/ledger.db")  # fmt: skip
        with gateway_process(tmp_path, *options) as (own_url, _, log):
            body = {"model": "echo", "messages": [{"role": "user", "content": SECRET}]}
            body |= {"stream": stream, "max_tokens": 5}
            for key in (tenant.key, "sk-wrong-one"):
                headers = {"authorization": f"Bearer {key}"}
                chat = f"{own_url}/v1/chat/completions"
                httpx.post(chat, json=body, headers=headers, timeout=20)
                httpx.post(chat, json=body | {"n": SECRET}, headers=headers, timeout=20)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200, 400, 401, 401]
    assert [line["output_tokens"] for line in lines] == [5, 0, 0, 0]
    assert lines[0]["is_stream"] is stream
    check_holds_no_secret(log.read_text(), tenant.key)
