"""Adapters over HTTP on a real engine: by CLI and by route, as models, beside the base."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
from tests.engine.test_lora_parity import train

from mxn.cli.serve import _adapters
from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import SamplingParams
from mxn.errors import ConfigError, ForbiddenError
from mxn.ledger.types import Principal
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer
from mxn.serve.adapters import allowed_path, deployment_id
from mxn.serve.app import create_app
from mxn.serve.gateway import _scope_of
from mxn.serve.launch import ModelRequest, load_models
from mxn.serve.served import ServedModels
from mxn.serve.server import running
from mxn.serve.settings import ServeSettings

BASE = shipped_dir() / "mxn-shakespeare-llama"
PROMPT = "ROMEO:\nWhat light"
LIMIT_S = 60.0
CONFIG = EngineConfig(
    model=str(BASE), device="cpu", dtype="float32", threads=1, max_sequences=8, kv_bytes=16 << 20
)


def wait_for(condition, what):
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        model = AutoModelForCausalLM.from_pretrained(BASE)
        train(model, path / name, seed=seed, target_modules=["q_proj", "v_proj", "down_proj"])
    return path


@pytest.fixture(scope="module")
def texts(folder) -> dict[str, str]:
    """What base and adapters answer to `PROMPT`, by an engine without a server."""
    engine = LocalEngine.load(CONFIG)
    names = ("first", "second")
    for name in names:
        engine.load_adapter(name, str(folder / name))
    prompt = Tokenizer.load(BASE).encode(PROMPT)
    greedy = SamplingParams(max_tokens=20, temperature=0)
    answers = engine.generate([prompt] * 3, greedy, [None, *names])
    found = {name: a.text for name, a in zip(("base", *names), answers, strict=True)}
    assert len(set(found.values())) == 3, "each one must answer in its own way"
    return found


@pytest.fixture(scope="module")
def server(folder, forked_engines):
    """(base URL, served models) with the adapter `first` loaded at the start."""
    adapters = (("first", str(folder / "first")),)
    requests = [ModelRequest(name="base", config=CONFIG, adapters=adapters)]
    models = ServedModels()
    models.expect("base")
    settings = ServeSettings(adapter_folder=str(folder))
    app = create_app(models, settings, startup=lambda served: load_models(served, requests))
    with running(app) as url:
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, "the model is ready")
        yield url, models


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=LIMIT_S) as client:
        yield client


def complete(http, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    return http.post("/v1/completions", json=body)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def load(http, name: str, path: str, **fields) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path} | fields
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_an_adapter_of_the_start_is_a_model(server, http, texts):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards["base"]["parent"] is None
    for name in ("first", deployment_id("first")):
        assert (cards[name]["root"], cards[name]["parent"]) == ("first", "base")
        assert text_of(complete(http, name)) == texts["first"]
    assert text_of(complete(http, "base")) == texts["base"]
    assert text_of(complete(http, "first@cpu")) == texts["first"]
    assert text_of(complete(http, "batch-first")) == texts["first"]


def test_chat_streams_and_the_official_client(server, http):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        said = {}
        for model in ("base", "first"):
            stream = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Speak"}],
                max_tokens=16, temperature=0, stream=True,
            )  # fmt: skip
            chunks = list(stream)
            assert {chunk.model for chunk in chunks} == {model}
            said[model] = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert said["base"] != said["first"]
    url = f"/maas/deployment/{deployment_id('first')}/chat/completions"
    fields = {"messages": [{"role": "user", "content": "Speak"}], "max_tokens": 16}
    answer = http.post(url, json=fields | {"temperature": 0})
    assert answer.json()["choices"][0]["message"]["content"] == said["first"]


def test_load_use_replace_and_unload(http, folder, texts):
    loaded = load(http, "mine", "second")
    assert (loaded.status_code, loaded.text) == (
        200, "Success: LoRA adapter 'mine' added successfully.",
    )  # fmt: skip
    assert text_of(complete(http, "mine")) == texts["second"]
    again = error_of(load(http, "mine", "first"), 400)
    assert again["code"] == "adapter_exists"
    assert load(http, "mine", str(folder / "first"), load_inplace=True).status_code == 200
    assert text_of(complete(http, "mine")) == texts["first"]
    gone = unload(http, "mine")
    assert gone.text == "Success: LoRA adapter 'mine' removed successfully."
    assert error_of(complete(http, "mine"), 404)["code"] == "model_not_found"
    assert "mine" not in http.get("/v1/models").text
    missing = error_of(unload(http, "mine"), 404)
    assert missing["message"] == "The lora adapter 'mine' cannot be found. Loaded: 'first'."


@pytest.mark.parametrize(
    ("name", "path", "fields", "status", "message"),
    [
        ("x", "nowhere", {}, 404, "is not a folder"),
        ("x", "../..", {}, 403, "outside of the folder"),
        ("x", "/etc", {}, 403, "outside of the folder"),
        ("base", "second", {}, 400, "two models are named 'base'"),
        ("first", "second", {}, 400, "is loaded already"),
        (" ", "second", {}, 400, "1 to 256 printable characters"),
        ("x", "second", {"model": "no"}, 404, "The model 'no' does not exist"),
        ("x", "second", {"model": "first"}, 400, "is an adapter itself"),
    ],
)
def test_what_cannot_be_loaded_is_refused(http, name, path, fields, status, message):
    before = http.get("/v1/models").json()
    assert message in error_of(load(http, name, path, **fields), status)["message"]
    assert http.get("/v1/models").json() == before
    assert error_of(http.post("/v1/load_lora_adapter", json={"lora_name": "x"}), 400)


def test_a_killed_engine_comes_back_with_its_adapters(server, http, texts):
    client = server[1].get("base").client.replicas[0].client
    load(http, "late", "second")
    os.kill(client.pid, signal.SIGKILL)
    wait_for(lambda: client.num_restarts == 1 and client.is_healthy, "the engine is back")
    for name, want in (("late", "second"), ("first", "first"), ("base", "base")):
        wait_for(lambda name=name: complete(http, name).status_code == 200, f"{name} answers")
        assert text_of(complete(http, name)) == texts[want]
    assert unload(http, "late").status_code == 200


def test_an_adapter_that_cannot_be_loaded_at_the_start_stops_its_model(folder, forked_engines):
    async def start() -> ServedModels:
        models = ServedModels()
        adapters = (("good", str(folder / "first")), ("bad", str(folder / "no")))
        request = ModelRequest(name="base", config=CONFIG, adapters=adapters)
        with pytest.raises(Exception, match="is not a folder"):
            await load_models(models, [request])
        return models

    import asyncio

    models = asyncio.run(start())
    assert models.all() == []
    assert "is not a folder" in models.pending["base"].failure


def test_bad_bodies_are_named(http):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        for content in (b"", b"{", b"nonsense"):
            assert error_of(http.post(path, content=content), 400)["code"] == "invalid_json"
        for body in ({}, {"lora_name": 3, "lora_path": "x"}):
            assert error_of(http.post(path, json=body), 400)["param"] == "lora_name"


def test_replicas_without_adapters_say_so(make_api):
    api = make_api(is_alone=True)
    answer = api.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"})
    assert "take no adapters" in error_of(answer, 400)["message"]


def test_names_paths_and_scopes(tmp_path):
    assert deployment_id("first") == deployment_id("first") != deployment_id("second")
    assert len(deployment_id("x")) == len("mif-xxxxxxxx")
    assert _scope_of("/v1/load_lora_adapter") == _scope_of("/v1/unload_lora_adapter") == "admin"
    assert "admin" not in Principal(key_id="k", org_id="o", project_id="p").scopes
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    inside = str(tmp_path / "in")
    assert allowed_path("a", inside) == f"{tmp_path}/in/a"
    assert allowed_path("/any/where", None) == "/any/where"
    for path in ("link", "..", str(tmp_path), f"{inside}-not"):
        with pytest.raises(ForbiddenError, match="outside of the folder"):
            allowed_path(path, inside)
    assert _adapters(["a=x/y=z"], 1) == (("a", str(Path("x/y=z").resolve())),)
    with pytest.raises(ConfigError, match="is not NAME=PATH"):
        _adapters(["a"], 1)
    with pytest.raises(ConfigError, match="--lora needs one model to adapt, got 2"):
        _adapters(["a=b"], 2)
