"""M×N names and paths: model@chip, /maas, batch-model, flat errors, headers on the route."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import Generate
from mxn.serve.app import create_app
from mxn.serve.context import Hop, RequestContext
from mxn.serve.flat import CODES
from mxn.serve.fleet import Replica
from mxn.serve.names import BATCH_PRIORITY
from mxn.serve.pooled import PooledClient
from mxn.serve.routing.headers import route_headers
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "hello"}]
KEY = {"authorization": "Bearer sk-right"}


class Pair:
    """Two pools: `big` on two chips, `small` on one."""

    def __init__(self, make: Any, **settings: Any) -> None:
        self.cpu, self.gpu = on("x86-avx512-vnni", "cpu:0"), on("nvidia-h200", "cuda:0")
        self.small = on("x86-avx512-vnni", "cpu:0")
        replicas = [Replica(id="c0", client=self.cpu), Replica(id="g0", client=self.gpu)]
        models = ServedModels(
            [
                served("org/big", PooledClient(replicas), aliases=("big", "mif-12345678")),
                served("small", PooledClient([Replica(id="s0", client=self.small)])),
                served("plain", on("nvidia-a100-80g", "cuda:1")),
            ]
        )
        self.api = make(create_app(models, ServeSettings(**settings)))

    def chat(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        body = {"messages": MESSAGES, "max_tokens": 4} | fields
        return self.api.post(path, body, headers=headers)


def on(chip: str, device: str) -> EchoEngine:
    engine = EchoEngine()
    engine._info = msgspec.structs.replace(engine.info, chip=chip, device=device)
    return engine


def served(name: str, client: Any, **options: Any) -> ServedModel:
    return ServedModel(name=name, client=client, tokenizer=EchoEngine().tokenizer, **options)


@pytest.fixture
def pair(api_of: Any) -> Pair:
    return Pair(api_of)


@pytest.mark.parametrize("chip", ["nvidia-h200", "NVIDIA-H200", "nvidia", "cuda"])
@pytest.mark.parametrize("path", ["name", "path"])
def test_a_model_is_asked_for_on_a_chip(pair: Pair, chip: str, path: str) -> None:
    if path == "name":
        answer = pair.chat(model=f"big@{chip}")
    else:
        answer = pair.chat(f"/maas/big/{chip}/chat/completions")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "org/big", "the price is the model's; the chip is in a header"
    assert len(pair.gpu.seen) == 1
    assert not pair.cpu.seen


def test_the_cpu_is_named_by_the_kind_of_its_device(pair: Pair) -> None:
    assert pair.chat(model="org/big@cpu").status_code == 200
    assert pair.chat("/maas/org/big/CPU/chat/completions").status_code == 200
    assert len(pair.cpu.seen) == 2


def test_a_model_without_a_pool_runs_on_its_own_chip(pair: Pair) -> None:
    assert pair.chat(model="plain@nvidia").status_code == 200
    assert pair.chat(model="plain@cpu").status_code == 400


def test_the_path_wins_over_the_body(pair: Pair) -> None:
    answer = pair.chat("/maas/small/cpu/chat/completions", model="big@nvidia")
    assert answer.json()["model"] == "small"


def test_pairs_that_do_not_exist_list_those_that_do(pair: Pair) -> None:
    for name, status, code in (
        ("small@nvidia-h200", 400, "model_not_on_chip"),
        ("small@ascend-910b", 400, "model_not_on_chip"),
        ("small@ascend", 400, "model_not_on_chip"),
        ("small@abacus", 404, "chip_not_found"),
        ("nobody@cpu", 404, "model_not_found"),
    ):
        error = pair.chat(model=name)
        assert error.status_code == status, name
        assert error.json()["error"]["code"] == code
        model, _, chip = name.partition("@")
        flat = pair.chat(f"/maas/{model}/{chip}/chat/completions")
        assert flat.status_code == status
        assert flat.json()["code"] == CODES[code]
        if code != "model_not_found":
            assert "org/big@nvidia-h200" in error.json()["error"]["message"]
            assert "small@x86-avx512-vnni" in flat.json()["msg"]


def test_a_deployment_has_a_path_of_its_own(pair: Pair) -> None:
    answer = pair.chat("/maas/deployment/mif-12345678/chat/completions")
    assert answer.json()["model"] == "org/big"
    for name in ("mif-unknown", "small"):
        missing = pair.chat(f"/maas/deployment/{name}/chat/completions")
        assert missing.status_code == 404
        assert missing.json()["code"] == CODES["model_not_found"]
        assert "mif-12345678" in missing.json()["msg"]


def test_the_other_paths_are_those_of_v1(api: Any) -> None:
    body = {"model": "echo", "messages": MESSAGES, "max_tokens": 4}
    assert api.post("/maas/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 4
    vectors = api.post("/maas/v1/embeddings", {"model": "embed", "input": "text"}).json()
    assert len(vectors["data"]) == 1
    ranked = api.post(
        "/maas/v1/rerank", {"model": "rank", "query": "a", "documents": ["b", "a"]}
    ).json()
    assert ranked["results"][0]["index"] == 1
    assert api.get("/maas/v1/models").json() == api.get("/v1/models").json()


def test_cards_list_the_chips(pair: Pair) -> None:
    cards = {card["id"]: card for card in pair.api.get("/maas/v1/models").json()["data"]}
    assert cards["org/big"]["chips"] == ["x86-avx512-vnni", "nvidia-h200"]
    assert cards["small"]["chips"] == ["x86-avx512-vnni"]


def test_errors_are_flat_and_keep_their_status(pair: Pair) -> None:
    for path, body, status in (
        ("/maas/v1/chat/completions", {"model": "nobody", "messages": MESSAGES}, 404),
        ("/maas/v1/chat/completions", {"model": "small"}, 400),
        ("/maas/small/cpu/chat/completions", ["no object"], 400),
        ("/maas/small/cpu/chat/completions", {"messages": MESSAGES, "temperature": "x"}, 400),
        ("/maas/v1/nothing", {}, 404),
        ("/maas/v1/embeddings", {"model": "small", "input": "x"}, 400),
    ):
        answer = pair.api.post(path, body)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()) == {"code", "msg"}
        assert 61000 <= answer.json()["code"] < 62000
    too_long = {"messages": [{"role": "user", "content": "x" * 5000}]}
    answer = pair.api.post("/maas/small/cpu/chat/completions", too_long)
    assert answer.json()["code"] == CODES["context_length_exceeded"]
    broken = pair.api.request("POST", "/maas/small/cpu/chat/completions", content=b"{")
    assert broken.json()["code"] == CODES["invalid_json"]


def test_no_token_is_60000_and_a_bad_key_10009(api_of: Any) -> None:
    pair = Pair(api_of, api_keys=("sk-right",))
    for path in ("/maas/small/cpu/chat/completions", "/maas/v1/chat/completions", "/maas/v1/x"):
        for headers, code in (({}, 60000), ({"authorization": "Bearer sk-wrong"}, 10009)):
            answer = pair.chat(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["code"] == code
    answer = pair.chat("/v1/chat/completions", model="small")
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert pair.chat("/maas/small/cpu/chat/completions", headers=KEY).status_code == 200


def test_an_error_in_the_stream_is_flat(api_of: Any) -> None:
    engine = EchoEngine(dies_after=2)
    models = ServedModels([served("weak", engine)])
    api = api_of(create_app(models))
    body = {"messages": MESSAGES, "stream": True}
    answer = api.post("/maas/weak/echo/chat/completions", body)
    events = answer.text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    error = json.loads(events[-3].removeprefix("data: "))
    assert error["code"] == CODES["engine_unavailable"]
    assert "msg" in error


def test_a_batch_name_runs_at_low_priority_and_keeps_its_name(pair: Pair) -> None:
    answer = pair.chat(model="batch-small")
    assert answer.json()["model"] == "batch-small"
    (request,) = pair.small.seen
    assert isinstance(request, Generate)
    assert request.priority == BATCH_PRIORITY
    assert pair.chat(model="batch-big@nvidia").status_code == 200
    (pinned,) = pair.gpu.seen
    assert isinstance(pinned, Generate)
    assert pinned.priority == BATCH_PRIORITY
    assert pair.chat(model="batch-nobody").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_what_was_chosen(pair: Pair, stream: bool) -> None:
    headers = pair.chat(model="big@nvidia", stream=stream).headers
    assert headers["x-mxn-chip"] == "nvidia-h200"
    assert headers["x-mxn-replica"] == "g0"
    assert headers["x-mxn-route"] == "only replica"
    free = pair.chat(model="big", stream=stream).headers
    assert free["x-mxn-replica"] in ("c0", "g0")
    assert free["x-mxn-route"].startswith(("load", "prefix"))


def test_headers_of_a_moved_request_name_each_replica_once() -> None:
    context = RequestContext()
    assert route_headers(context) == {}
    context.hops.append(Hop(replica="c0", chip="cpu-x", reason="load 0, weight 0.50"))
    context.hops.append(Hop(replica="g0", chip="nvidia-h200", reason="resumed 3 tokens: dïed\n"))
    assert route_headers(context) == {
        "x-mxn-chip": "cpu-x,nvidia-h200",
        "x-mxn-replica": "c0,g0",
        "x-mxn-route": "resumed 3 tokens: d?ed?",
    }


def test_every_maas_route_is_in_the_document_with_flat_errors(api: Any) -> None:
    document = api.get("/openapi.json").json()
    paths = {path for path in document["paths"] if path.startswith("/maas/")}
    assert "/maas/{model}/{chip}/chat/completions" in paths
    assert len(paths) == 6
    for path in paths:
        for entry in document["paths"][path].values():
            schema = entry["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("FlatError")
