"""`mxn top` against a real gateway under load, and its arithmetic on two looks."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest
from rich.console import Console

from mxn.cli.rates import Look, Summary, Window, summarize
from mxn.cli.top import _Server, draw
from mxn.engine.echo import EchoEngine
from mxn.serve.running import announce
from support.gateways import gateway


@contextmanager
def busy(served, *models):
    """Ask without a pause until the block ends; yield the list of answers' status codes."""
    is_over, codes = threading.Event(), []

    def work(model):
        while not is_over.is_set():
            codes.append(served.chat(model).status_code)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def served(tmp_path):
    with gateway(tmp_path, [EchoEngine(token_s=0.005), EchoEngine(token_s=0.005)]) as found:
        yield found


def test_top_shows_what_happens_now(mxn, served):
    words = ("--interval", 1, "--url", served.url, "--key", served.tenant.key)
    served.chat("echo")  # before the window
    with busy(served, "echo", "echo", "far") as codes:
        # A dead server counts as up from the end of its pause to the next try: look again then.
        for _ in range(5):
            done = mxn("top", "--once", "--json", *words)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            if any(row["state"] == "failing" for row in found["replicas"]):
                break
    assert set(codes) == {200}
    assert (found["url"], found["state"]) == (served.url, "ok")
    assert 0.9 < found["seconds"] < 5
    models = {row["model"]: row for row in found["models"]}
    assert set(models) == {"echo", "far"}
    echo, far = models["echo"], models["far"]
    total = echo["requests_per_s"] + far["requests_per_s"]
    assert found["requests_per_s"] == pytest.approx(total), "probes do not count"
    # Each request is 8 tokens; up to three are half counted when a look is taken.
    near = {"abs": 3 * 8 / found["seconds"]}
    assert echo["output_tokens_per_s"] == pytest.approx(8 * echo["requests_per_s"], **near)
    assert far["output_tokens_per_s"] == pytest.approx(8 * far["requests_per_s"], **near)
    made = sum(r["tokens_per_s"] for r in found["replicas"] if r["model"] == "echo")
    assert made == pytest.approx(echo["output_tokens_per_s"], **near)
    assert 0.03 < echo["latency_p50_s"] <= echo["latency_p95_s"] < 5  # 8 tokens of 5 ms
    assert echo["first_token_p50_s"] < echo["latency_p50_s"]
    assert far["first_token_p50_s"] is None
    assert 0 < far["latency_p50_s"] < 5
    assert echo["errors_per_s"] == echo["refused_per_s"] == 0
    dollars = echo["cost_micro_per_min"]["USD"] + far["cost_micro_per_min"]["USD"]
    assert found["cost_micro_per_min"]["USD"] == pytest.approx(dollars, abs=2)
    price = served.chat("echo").json()["usage"]["prompt_tokens"] + 2 * 8
    requests, paid = echo["requests_per_s"], echo["cost_micro_per_min"]["USD"] / 60
    assert paid == pytest.approx(price * requests, abs=3 * price / found["seconds"])
    assert 0 < found["ledger_p95_s"] < 2
    states = {(r["replica"], r["chip"]): r["state"] for r in found["replicas"]}
    assert states == {("echo-0", "chip-a"): "up", ("echo-1", "chip-b"): "up",
                      ("gone", ""): "failing", ("works", "chip-c"): "up"}  # fmt: skip
    console = Console(width=160, file=io.StringIO())
    console.print(draw(msgspec.convert(found, Summary)))
    text = console.file.getvalue()
    for word in (served.url, "requests/s", "echo-1", "chip-c", "failing", "USD"):
        assert word in text


def test_top_says_what_is_wrong_in_one_line(mxn, served):
    done = mxn("top", "--once", "--url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no answer from http://127.0.0.1:1")
    done = mxn("top", "--once", "--url", served.url)
    assert done.returncode == 2
    assert "API key" in done.stderr
    assert "mxn top --url" in mxn("top", "--once").stderr


def test_top_finds_the_server_of_this_machine(mxn, home, served, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(home))
    monkeypatch.setenv("MXN_API_KEY", served.tenant.key)
    file = announce(served.url, ["echo"], needs_key=True)
    done = mxn("top", "--once", "--interval", 0.1)
    file.unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(served.url)


def test_a_server_that_goes_away_is_told_and_may_come_back(tmp_path):
    with gateway(tmp_path) as served:
        server = _Server(served.url, served.tenant.key)
        summaries = server.summaries(0.1)
        assert isinstance(next(summaries), Summary)
    for _ in range(2):
        assert "no answer from" in str(next(summaries))
    server.close()


def test_top_in_a_terminal_redraws_and_ends_on_ctrl_c(home, served):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "mxn.cli.main",
        "top",
        "--url",
        served.url,
        "--interval",
        "0.2",
    ]
    environment = os.environ | {"MXN_HOME": str(home), "MXN_API_KEY": served.tenant.key,
                                "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}  # fmt: skip
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown, deadline_s = b"", time.monotonic() + 20
    while shown.count(b"echo-1") < 2:
        assert time.monotonic() < deadline_s, shown
        shown += os.read(ours, 65536)
    process.send_signal(2)
    threading.Thread(target=drain, args=(ours,), daemon=True).start()
    assert process.wait(10) == 0
    assert b"Traceback" not in shown


def drain(descriptor):
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        pass  # the other end is closed, which is how a terminal ends
    finally:
        os.close(descriptor)


def look(at_s, metrics, load=None, health=None):
    return Look.read(at_s, metrics, load or {}, health or {"models": {}})


HISTOGRAM = """# TYPE mxn_x_seconds histogram
mxn_x_seconds_bucket{{le="0.1"}} {}
mxn_x_seconds_bucket{{le="0.5"}} {}
mxn_x_seconds_bucket{{le="1.0"}} {}
mxn_x_seconds_bucket{{le="+Inf"}} {}
"""


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 10, 10, 10), 0.5, 0.05),
        ((0, 10, 10, 10), 0.5, 0.3),
        ((5, 10, 10, 10), 0.5, 0.1),
        ((5, 10, 10, 10), 0.95, 0.46),
        ((0, 0, 0, 10), 0.5, 1.0),  # beyond the last bound: at least that
    ],
)
def test_quantiles_are_prometheus(counts, share, expected):
    before, after = HISTOGRAM.format(7, 8, 9, 9), [7, 8, 9, 9]
    after = HISTOGRAM.format(*(a + c for a, c in zip(after, counts, strict=True)))
    found = Window(look(0, before), look(1, after)).quantile("mxn_x_seconds", share)
    assert found == (None if expected is None else pytest.approx(expected))


REQUESTS = """# TYPE mxn_requests_total counter
mxn_requests_total{{endpoint="/health",status="200",model=""}} 1000
mxn_requests_total{{endpoint="/v1/chat/completions",status="200",model="m"}} {}
mxn_requests_total{{endpoint="/v1/chat/completions",status="503",model="m"}} {}
mxn_requests_total{{endpoint="/v1/chat/completions",status="429",model="m"}} {}
# TYPE mxn_broken_streams_total counter
mxn_broken_streams_total{{reason="error",model="m"}} {}
# TYPE mxn_failovers_total counter
mxn_failovers_total{{model="m"}} {}
"""


def test_errors_refusals_and_broken_streams_are_told_apart():
    before, after = REQUESTS.format(10, 1, 0, 0, 0), REQUESTS.format(30, 5, 6, 2, 3)
    found = summarize("u", look(0, before), look(2, after))
    assert (found.requests_per_s, found.errors_per_s, found.refused_per_s) == (15, 3, 3)
    assert found.failovers == 3
    (model,) = found.models
    assert (model.model, model.requests_per_s, model.errors_per_s) == ("m", 15, 3)


def test_a_server_that_began_again_has_no_negative_rates():
    before, after = REQUESTS.format(100, 50, 9, 9, 9), REQUESTS.format(4, 0, 0, 0, 0)
    found = summarize("u", look(0, before), look(1, after))
    assert (found.requests_per_s, found.errors_per_s) == (4, 0)
