"""Metrics of a gateway with a real ledger: every request counts once, with few labels."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mxn.engine.echo import EchoEngine
from mxn.ledger.types import Receipt, Settlement
from mxn.serve import traffic
from mxn.serve.context import RequestContext
from mxn.serve.traffic import OTHER, Table, Waits, endpoint_of
from support.gateways import gateway

CHAT = "/v1/chat/completions"


@pytest.fixture
def served(tmp_path):
    with gateway(tmp_path) as found:
        yield found


def test_tokens_and_money_are_counted_by_model_chip_and_organization(served):
    answers = [served.chat(), served.chat(stream=True), served.chat("far")]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    chip = answers[0].headers["x-mxn-chip"]
    used = answers[0].json()["usage"]
    found = served.scrape()

    def total(name, **labels):
        wanted = set(labels.items())
        return sum(value for (n, have), value in found.items() if n == name and wanted <= have)

    assert total("mxn_requests_total", endpoint=CHAT, status="200", model="echo") == 2
    assert total("mxn_requests_total", endpoint=CHAT, status="200", model="far") == 1
    assert total("mxn_tokens_total", kind="output", model="echo") == 16
    assert total("mxn_tokens_total", kind="output", model="echo", chip=chip) >= 8
    assert total("mxn_tokens_total", kind="input", model="echo") == 2 * used["prompt_tokens"]
    assert total("mxn_tokens_total", kind="output", model="far", chip="chip-c") == 8
    assert total("mxn_tokens_total", kind="input", model="far") == used["prompt_tokens"]
    # 1 per input token and 2 per output token, in millionths of a dollar
    cost = used["prompt_tokens"] + 2 * 8
    org = served.tenant.principal.org_id
    assert total("mxn_cost_micro_total", model="echo", org=org, currency="USD") == 2 * cost
    assert total("mxn_cost_micro_total", model="far", chip="chip-c", org=org) == cost
    assert total("mxn_ledger_seconds_count", operation="open") == 3
    assert total("mxn_ledger_seconds_count", operation="settle") == 3
    assert 0 < total("mxn_ledger_seconds_sum") < 5
    assert total("mxn_http_request_seconds_count", endpoint=CHAT, model="echo") == 2


def test_refusals_say_why(served):
    served.tenant.limit("requests", 1, model="echo")
    until_refused(served, "echo")
    served.tenant.budget(1, currency="USD")
    until_refused(served, "far")
    found = served.scrape()
    refusals = {
        (dict(labels)["reason"], dict(labels)["model"]): value
        for (name, labels), value in found.items()
        if name == "mxn_refusals_total"
    }
    assert refusals == {("requests", "echo"): 1, ("budget", "far"): 1}
    assert served.value("mxn_requests_total", endpoint=CHAT, status="429", model="echo") == 1


def until_refused(served, model):
    """Ask until a gateway knows the new limit, which is a second at most, and refuses."""
    deadline_s = time.monotonic() + 5
    while served.chat(model).status_code != 429:
        assert time.monotonic() < deadline_s


def test_a_failover_is_counted_for_the_model_and_against_the_replica(tmp_path):
    engines = [EchoEngine(dies_after=3), EchoEngine(dies_after=100)]
    with gateway(tmp_path, engines) as served:
        for number in range(4):  # until the one that dies was asked
            answer = served.chat(text=f"{number} hello")
            assert answer.json()["usage"]["completion_tokens"] == 8
            if not engines[0].is_healthy:
                break
        labels = {"model": "echo", "replica": "echo-0", "chip": "chip-a"}
        assert served.value("mxn_failovers_total", model="echo") == 1
        assert served.value("mxn_replica_requests_lost_total", **labels) == 1
        assert served.value("mxn_replica_tokens_total", **labels) == 3
        assert served.value("mxn_replica_up", **labels) == 0
        other = {"model": "echo", "replica": "echo-1", "chip": "chip-b"}
        assert served.value("mxn_replica_up", **other) == 1
        assert served.value("mxn_replica_requests_lost_total", **other) == 0


def test_a_stream_that_breaks_is_counted_though_its_status_was_200(tmp_path):
    with gateway(tmp_path, [EchoEngine(dies_after=3), EchoEngine(dies_after=3)]) as served:
        answer = served.chat(stream=True)
        assert answer.status_code == 200
        assert '"error"' in answer.text
        labels = {"reason": "replica_lost", "model": "echo"}
        assert served.value("mxn_broken_streams_total", **labels) == 1
        assert served.chat(stream=True).status_code == 503
        assert served.value("mxn_broken_streams_total", **labels) == 1
        assert served.value("mxn_requests_total", endpoint=CHAT, status="503", model="echo") == 1


def test_the_first_piece_of_a_foreign_stream_is_timed(served):
    name = "mxn_time_to_first_token_seconds"
    assert served.chat("far").status_code == 200
    assert not served.value(f"{name}_count", model_name="far"), "only streams have one"
    assert served.chat("far", stream=True).status_code == 200
    assert served.value(f"{name}_count", model_name="far") == 1
    first_s = served.value(f"{name}_sum", model_name="far")
    whole_s = served.value("mxn_http_request_seconds_sum", endpoint=CHAT, model="far")
    assert 0 < first_s < whole_s


def test_tokens_are_counted_while_an_answer_runs(tmp_path):
    with gateway(tmp_path, [EchoEngine(token_s=0.02)]) as served:
        body = {"model": "echo", "prompt": "hello", "max_tokens": 1000, "stream": True}
        headers = {"authorization": f"Bearer {served.tenant.key}"}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, headers=headers):
            deadline_s = time.monotonic() + 5
            while not served.value("mxn_generation_tokens_total", model_name="echo"):
                assert time.monotonic() < deadline_s
            assert served.value("mxn_prompt_tokens_total", model_name="echo") == 5
            assert served.value("mxn_num_requests_running", model_name="echo") == 1


def test_a_foreign_server_that_is_away_is_seen(served):
    for _ in range(2):
        assert served.chat("far").status_code == 200
    gone = {"model": "far", "replica": "gone", "chip": ""}
    works = {"model": "far", "replica": "works", "chip": "chip-c"}
    assert served.value("mxn_replica_up", **gone) == 0
    assert served.value("mxn_replica_requests_lost_total", **gone) >= 1
    assert served.value("mxn_replica_up", **works) == 1
    assert served.value("mxn_replica_tokens_total", **works) == 16
    assert served.value("mxn_replica_requests_running", **works) == 0
    assert served.value("mxn_replica_requests_waiting", **works) is None, "nobody knows"
    assert served.value("mxn_failovers_total", model="far") >= 1


def test_running_requests_are_seen_at_their_replica_and_in_the_queue(tmp_path):
    with gateway(tmp_path, [EchoEngine(token_s=0.05)]) as served:
        labels = {"model": "echo", "replica": "echo-0", "chip": "chip-a"}
        served.pool.replicas[0].max_in_flight = 1
        body = {"model": "echo", "prompt": "hello", "max_tokens": 100, "stream": True}
        headers = {"authorization": f"Bearer {served.tenant.key}"}
        with ThreadPoolExecutor() as threads, httpx.Client(headers=headers, timeout=20) as http:
            ask = http.build_request("POST", f"{served.url}/v1/completions", json=body)
            running = http.send(ask, stream=True)
            assert served.value("mxn_replica_requests_running", **labels) == 1
            assert served.value("mxn_queue_waiting", model="echo") == 0
            waiting = threads.submit(http.post, str(ask.url), json=body | {"max_tokens": 1})
            wait_for(served, 1, "mxn_queue_waiting", model="echo")
            load = served.get("/load").json()
            assert load["models"]["echo"]["queued"] == 1
            assert load["server_load"] == 2
            running.close()
            assert waiting.result().status_code == 200
        wait_for(served, 0, "mxn_replica_requests_running", **labels)
        assert served.value("mxn_queue_waiting", model="echo") == 0


def wait_for(served, value, name, **labels):
    deadline_s = time.monotonic() + 5
    while (found := served.value(name, **labels)) != value:
        assert time.monotonic() < deadline_s, found


def test_labels_hold_no_ids_and_no_unknown_paths(served):
    for path in (
        "/v1/models/echo", "/v1/models/models", "/v1/models/v1", "/v1/models/{model}",
        "/nope/1", "/nope/2", "/v1/files/file-1", "/v1/batches/c/cancel", "/v1/files/%7Bfile_id%7D",
    ):  # fmt: skip
        served.get(path)
    served.chat("no-such-model-7")
    served.chat(f"{'x' * 300}")
    found = served.scrape()
    endpoints = {dict(labels)["endpoint"] for name, labels in found if name == "mxn_requests_total"}
    assert endpoints <= set(traffic_paths(served)) | {OTHER}
    assert {"/v1/models/{model}", "/v1/files/{file_id}", OTHER, CHAT} <= endpoints
    models = {dict(labels)["model"] for name, labels in found if name == "mxn_requests_total"}
    assert models <= {"", "echo", "far"}


def traffic_paths(served):
    return httpx.get(f"{served.url}/openapi.json").json()["paths"]


def test_an_endpoint_is_filled_in_rather_than_cut_out():
    paths = {"/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel", "/v1/models/{model:path}"}
    scope = {"path": "/v1/batches/c/cancel", "path_params": {"batch_id": "c"}}
    assert endpoint_of(scope, paths) == "/v1/batches/{batch_id}/cancel"
    scope = {"path": "/v1/models/a/b", "path_params": {"model": "a/b"}}
    assert endpoint_of(scope, paths) == "/v1/models/{model}"
    assert endpoint_of({"path": "/x", "path_params": {}}, paths) == OTHER
    assert endpoint_of({"path": "/x"}, paths) == OTHER


def test_tables_stay_small(monkeypatch):
    monkeypatch.setattr(traffic, "MAX_LABELS", 3)
    monkeypatch.setattr(traffic, "MAX_HISTOGRAMS", 2)
    table = Table("mxn_x", "x", ("status", "model"), kept=("status",))
    waits = Waits("mxn_y", "y", ("model",), (0.1, 1.0))
    for number in range(10):
        table.add(("200", f"m{number}"))
        waits.add((f"m{number}",), 0.5)
    assert len(table.values) == 4
    assert table.values["200", OTHER] == 7
    assert sum(table.values.values()) == 10
    samples = waits.family().samples
    counts = {s.labels["model"]: s.value for s in samples if s.name == "mxn_y_count"}
    assert counts == {"m0": 1, "m1": 1, OTHER: 8}


def test_counting_a_request_is_cheap():
    """Some microseconds: a gateway must not feel that it is watched."""
    counts = traffic.Traffic()
    counts.paths = frozenset({CHAT, *(f"/v1/{at}/{{id}}" for at in range(50))})
    context = RequestContext(model="m")
    used = Settlement(reason="complete", chip="c", input_tokens=3, output_tokens=4)
    receipt = Receipt(usage_id="u", cost_micro=7, currency="USD")
    took = []
    for _ in range(2000):
        begun_s = time.perf_counter()
        counts.settled(context, used, receipt)
        counts.ended(context, {"path": CHAT}, 200)
        took.append(time.perf_counter() - begun_s)
    assert sorted(took)[1000] < 50e-6


def test_totals_of_an_engine_go_on_when_it_restarts():
    from mxn.engine.protocol import EngineStats
    from mxn.serve.metrics import Metrics

    metrics = Metrics()
    for drafted, accepted in ((7, 3), (9, 4), (2, 1)):  # the last from a new process
        stats = EngineStats(draft_tokens_total=drafted, accepted_draft_tokens_total=accepted)
        metrics.set_gauges("m", stats)
    text = metrics.text().decode()
    assert 'mxn_spec_decode_num_draft_tokens_total{model_name="m"} 11.0' in text
    assert 'mxn_spec_decode_num_accepted_tokens_total{model_name="m"} 5.0' in text
