"""The load generator of bench/engine against a real server on a port of its own."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[3] / "bench" / "engine"
sys.path.insert(0, str(BENCH))

import mixed_load  # noqa: E402
import servers  # noqa: E402
import traffic  # noqa: E402
from protocol import Failed  # noqa: E402

sys.path.remove(str(BENCH))
for _file in BENCH.glob("*.py"):
    sys.modules.pop(_file.stem, None)  # names others may want

WORK = mixed_load.Work(count=12, context=64, longest=4096, vocab_size=4096, seed=0)


class Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as were asked for, less `missing`."""

    missing = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        count = body["max_tokens"] - self.missing
        self.send_response(200)
        self.end_headers()
        for _ in range(count):
            self._event({"choices": [{"index": 0, "text": "x"}]})
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, payload: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(Handler, "missing", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield traffic.Target(f"http://127.0.0.1:{server.server_port}", "any", limit_s=20.0)
        server.shutdown()


def test_both_loops_count_every_answer(target):
    work = WORK.jobs(words=1)
    tokens = sum(job.new_tokens for job in work)
    closed = traffic.closed_loop(target, work, slots=4)
    opened = traffic.open_loop(target, work, rate_per_s=100.0, seed=0)
    for found in (closed, opened):
        assert found["requests"] == 12
        assert found["output_tok_per_s"] * found["seconds"] == pytest.approx(tokens, rel=0.01)
        assert 0 < found["first_p50_s"] <= found["latency_p50_s"] <= found["latency_p95_s"]
    assert closed["capacity_per_s"] > 0
    assert opened["seconds"] >= 0.12 - 0.02  # twelve arrivals at 100 a second
    assert opened["rate_per_s"] == 100.0


def test_a_short_answer_ends_the_run(target, monkeypatch):
    monkeypatch.setattr(Handler, "missing", 1)
    with pytest.raises(Failed, match=r"Failed: an answer has \d+ tokens of \d+, done: True"):
        traffic.closed_loop(target, WORK.jobs(words=1), slots=2)


def test_a_whole_measurement_names_who_failed_and_goes_on(target):
    gone = traffic.Target("http://127.0.0.1:9", "any", limit_s=5.0)
    session = mixed_load.Session(WORK, slots=4)
    session.running = {
        "mxn:int8": servers.Server("mxn:int8", target, None),
        "a:x": servers.Server("a:x", target, None),
        "b:y": servers.Server("b:y", gone, None),
    }
    result = mixed_load.measure(session, None, probes=1, until_s=float("inf"))
    assert result["limit_from"] == "a:x"
    assert set(result["notes"]) == {"b:y"}
    assert "ConnectError" in result["notes"]["b:y"]
    assert set(result["rows"]) == {"mxn:int8", "a:x"}
    assert result["goodput"]["a:x"]["latency_p95_s"] <= result["p95_limit_s"]


def test_no_run_begins_that_would_end_too_late(target):
    session = mixed_load.Session(WORK, slots=4)
    session.running = {"a:x": servers.Server("a:x", target, None)}
    mixed_load.measure_rate(session, "a:x", rate_per_s=100.0, until_s=0.0)
    assert session.rows == {}
    assert "no time" in session.notes["a:x at 100/s"]
