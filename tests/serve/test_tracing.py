"""Spans of requests: what they say, what they never say, and that they reach a collector."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mxn.engine.echo import EchoEngine
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.tracing import Tracing
from support.gateways import gateway

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the launch code is zebra"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


def finished(spans, tracing):
    tracing._provider.force_flush()
    return {span.name: span for span in spans.get_finished_spans()}


def test_a_request_is_a_span_with_its_parts(tmp_path, spans):
    tracing = Tracing.to(spans, "mxn-test")
    with gateway(tmp_path, tracing=tracing) as served:
        answer = served.chat(text=SECRET, headers={"traceparent": PARENT})
        usage = answer.json()["usage"]
        httpx.get(f"{served.url}/metrics")
        found = finished(spans, tracing)
        whole = found["POST /v1/chat/completions"]
        assert f"{whole.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{whole.parent.span_id:016x}" == PARENT.split("-")[2]
        said = whole.attributes
        assert said["http.response.status_code"] == 200
        assert said["gen_ai.request.model"] == "echo"
        assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert said["mxn.cost_micro"] == usage["prompt_tokens"] + 2 * usage["completion_tokens"]
        assert said["mxn.org"] == served.tenant.principal.org_id
        parts = {"ledger open", "ledger settle", "queue", "replica"}
        assert set(found) == {"POST /v1/chat/completions", *parts}
        for name in parts:
            assert found[name].parent.span_id == whole.context.span_id
            assert whole.start_time <= found[name].start_time
            assert found[name].start_time <= found[name].end_time <= whole.end_time + 1_000_000
        assert found["replica"].attributes["mxn.replica"].startswith("echo-")
        everything = "".join(span.to_json() for span in spans.get_finished_spans())
        assert SECRET not in everything
        assert served.tenant.key not in everything


def test_a_takeover_and_an_error_are_seen(tmp_path, spans):
    tracing = Tracing.to(spans, "mxn-test")
    engines = [EchoEngine(dies_after=3), EchoEngine(dies_after=3)]
    with gateway(tmp_path, engines, tracing=tracing) as served:
        served.chat(text="one two three four five six seven", max_tokens=40)
        tracing._provider.force_flush()
        found = spans.get_finished_spans()
        hops = [span for span in found if span.name == "replica"]
        assert len(hops) >= 2
        assert any(span.attributes["mxn.is_takeover"] for span in hops)
        (whole,) = (span for span in found if span.name.startswith("POST"))
        assert whole.attributes["http.response.status_code"] == 503
        assert not whole.status.is_ok


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.got = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def test_spans_reach_a_collector_and_replicas_are_told_the_trace(collector, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    from mxn.serve.replicas.upstream import UpstreamConfig
    from mxn.serve.replicas.upstream_chat import UpstreamModel

    heard = []
    engine = EchoEngine()
    far = create_app(
        ServedModels([ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)])
    )

    async def listening(scope, receive, send):
        if scope["type"] == "http":
            heard.append(dict(scope["headers"]).get(b"traceparent"))
        await far(scope, receive, send)

    url = f"http://127.0.0.1:{collector.server_address[1]}"
    tracing = Tracing.open(url, "mxn-test")
    assert tracing is not None
    with running(listening) as far_url:
        app = create_app(ServedModels(), tracing=tracing)
        servers = [UpstreamConfig(url=far_url, model="echo")]
        app.state.mxn.upstreams.add(UpstreamModel("far", servers))
        with running(app) as near:
            body = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}
            answer = httpx.post(
                f"{near}/v1/chat/completions", json=body, headers={"traceparent": PARENT}
            )
            assert answer.status_code == 200
    # The server has ended, and sent what it had.
    ((path, _, data),) = collector.got
    assert path == "/v1/traces"
    assert bytes.fromhex(PARENT.split("-")[1]) in data
    told = [one.decode() for one in heard if one]
    assert told
    assert all(one.split("-")[1] == PARENT.split("-")[1] for one in told)
    assert all(one != PARENT for one in told), "the parent is our own span"


def test_without_a_collector_nothing_is_traced(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert Tracing.open(None, "mxn") is None
