"""Several workers of one gateway: whoever is asked answers for all of them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxn.engine.echo import EchoEngine
from mxn.errors import ConfigError
from mxn.serve.app import create_app
from mxn.serve.metrics import Metrics
from mxn.serve.peers import Told, bind_all, merge_metrics, merge_replicas
from mxn.serve.replica_status import ReplicaStatus
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from support.server import gateway_process

NUM = 20


def samples(text):
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "each in one piece"
    return [sample for family in families for sample in family.samples]


def counted(url):
    """Return requests for chat by worker, from one scrape over a new connection."""
    found = {}
    for sample in samples(httpx.get(f"{url}/metrics", timeout=10).text):
        assert "worker" in sample.labels
        found.setdefault(sample.labels["worker"], 0)
        if sample.name == "mxn_requests_total" and sample.labels["endpoint"].startswith("/v1"):
            found[sample.labels["worker"]] += sample.value
    return found


def test_every_worker_answers_for_all_of_them(tmp_path):
    engine = EchoEngine(token_s=0.01)
    far = ServedModels([ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)])
    with running(create_app(far)) as far_url:
        options = ("--replica", f"echo={far_url}", "--database", "none", "--workers", "2")
        with gateway_process(tmp_path, *options) as (url, process, log):

            def ask(_):
                body = {"model": "echo", "prompt": "hello there", "max_tokens": 4}
                # A new connection each time, so that both workers get some.
                return httpx.post(f"{url}/v1/completions", json=body, timeout=20).status_code

            wait_for_workers(url, 2)
            with ThreadPoolExecutor(4) as threads:
                assert set(threads.map(ask, range(NUM))) == {200}
            for _ in range(5):
                found = counted(url)
                assert set(found) == {"0", "1"}
                assert sum(found.values()) == NUM
            (row,) = httpx.get(f"{url}/load").json()["replicas"]
            assert (row["tokens"], row["running"]) == (4 * NUM, 0)
            psutil.Process(process.pid).children()[0].kill()
            wait_for_workers(url, 2)  # it was started again, and its counts began at zero
            assert sum(counted(url).values()) < NUM
            assert ask(0) == 200
    assert "Traceback" not in log.read_text()


def wait_for_workers(url, num):
    deadline_s = time.monotonic() + 30
    while True:
        try:
            if len(counted(url)) == num:
                return
        except httpx.HTTPError:
            pass  # nobody listens yet, or the one that was killed had taken the connection
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_merged_metrics_are_the_same_samples_with_one_more_label():
    texts = {}
    for index in range(3):
        metrics = Metrics()
        metrics.model('a"{b').prompt_tokens.inc(index + 1)
        metrics.model("x y").first_token.observe(0.2)
        texts[index] = metrics.text().decode() + "# HELP plain none\n# TYPE plain gauge\nplain 4\n"
    merged = samples(merge_metrics(texts).decode())
    for index, text in texts.items():
        wanted = sorted((s.name, sorted(s.labels.items()), s.value) for s in samples(text))
        found = sorted(
            (s.name, sorted((k, v) for k, v in s.labels.items() if k != "worker"), s.value)
            for s in merged if s.labels["worker"] == str(index)
        )  # fmt: skip
        assert found == wanted


def test_merged_replicas_add_up_what_only_each_worker_knows():
    def row(name, waiting, running, tokens):
        return ReplicaStatus(model="m", name=name, chip="c", state="up", running=running,
                             waiting=waiting, kv_used=None, tokens=tokens, lost=1)  # fmt: skip

    told = {
        0: Told(metrics="", queued={}, replicas=[row("ours", 0, 5, 10), row("far", None, 1, 1)]),
        1: Told(metrics="", queued={}, replicas=[row("ours", 0, 5, 20), row("far", None, 2, 2)]),
    }
    ours, far = merge_replicas(told, 1)
    assert (ours.running, ours.tokens, ours.lost) == (5, 30, 2)
    assert (far.running, far.tokens, far.lost) == (3, 3, 2)


def test_a_folder_with_too_long_a_name_is_said(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with pytest.raises(ConfigError, match="TMPDIR"):
        bind_all(folder, 1)
