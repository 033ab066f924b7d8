"""Bad grammars over HTTP to a real engine process: a 400 for who sent one, nothing for others."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
from mxn.models.catalogue import shipped_dir
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running

WIDE = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(600)}}
LATE = 'start: /[a-z ]{40}/ "a" b\nb: b "c"'
BAD = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": WIDE}}},
    {"guided_regex": r"[^\s\S]"},
    {"guided_grammar": 'start: "a" b\nb: b "c"'},
    {"guided_grammar": LATE},
    {"guided_regex": "a" * 300_000},
]


@pytest.fixture(scope="module")
def served(forked_engines):
    folder = str(shipped_dir() / "mxn-shakespeare-llama")
    engines = []

    async def load(models: ServedModels) -> None:
        config = EngineConfig(model=folder, device="cpu:0", threads=1)
        engines.append(await ProcessEngine.start(config))
        models.add(ServedModel.load("m", engines[0], folder))

    models = ServedModels()
    models.expect("m")
    with running(create_app(models, startup=load)) as url:
        end_s = time.monotonic() + 60
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield engines[0], client


def test_a_bad_grammar_is_refused_and_disturbs_nobody(served):
    engine, client = served
    pid = engine.pid

    def complete(_):
        fields = {"model": "m", "prompt": "To be", "max_tokens": 60, "ignore_eos": True}
        return client.post("/v1/completions", json=fields)

    with ThreadPoolExecutor(2) as pool:
        others = pool.map(complete, range(6))
        for fields in BAD:
            chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 80}
            answer = client.post("/v1/chat/completions", json=chat | fields)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert len(error["message"]) < 500
        assert [answer.status_code for answer in others] == [200] * 6
    assert engine.pid == pid
    assert engine.num_restarts == 0
