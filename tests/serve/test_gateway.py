"""Request ids, API keys, status routes, the OpenAPI document, start and end of a server."""

from __future__ import annotations

import asyncio
import logging
import threading

import httpx
import pytest

from mxn.engine.echo import EchoEngine
from mxn.errors import ConfigError
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import bind, running
from mxn.serve.settings import ServeSettings

KEYS = ServeSettings(api_keys=("sk-one", "sk-two"))


def test_request_id_of_the_client_is_kept_if_it_is_sane(api):
    assert api.get("/version", headers={"x-request-id": "my-7"}).headers["x-request-id"] == "my-7"
    for bad in ("a b", "x" * 200, "é"):
        headers = {"x-request-id": bad.encode()}
        assert api.get("/nope", headers=headers).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("key", ["sk-one", "sk-two"])
def test_every_key_opens(make_api, key):
    api = make_api(settings=KEYS)
    headers = {"authorization": f"Bearer {key}"}
    assert api.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-three"},
        {"authorization": "Bearer sk-on"},
        {"authorization": "Basic sk-one"},
        {"authorization": "sk-one"},
        {"authorization": b"Bearer \xff"},
    ],
)
def test_wrong_keys_are_401_in_shape(make_api, headers):
    api = make_api(settings=KEYS)
    for path in ("/v1/models", "/tokenize", "/nope", "/load"):
        response = api.get(path, headers=headers)
        assert response.status_code == 401
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "invalid_api_key"
        assert "sk-" not in response.text
    assert api.engine.seen == []


def test_probes_need_no_key(make_api):
    api = make_api(settings=KEYS)
    for path in ("/health", "/metrics", "/version", "/openapi.json"):
        assert api.get(path).status_code == 200


def test_keys_and_prompts_are_in_no_log(make_api, caplog):
    caplog.set_level(logging.DEBUG)
    api = make_api(settings=KEYS)
    for key in ("sk-one", "sk-wrong"):
        headers = {"authorization": f"Bearer {key}"}
        body = {"model": "echo", "prompt": "a private prompt", "max_tokens": 1}
        api.post("/v1/completions", body, headers=headers)
        api.post("/v1/completions", body | {"temperature": "x"}, headers=headers)
    assert "sk-" not in caplog.text
    assert "private" not in caplog.text
    assert "sk-" not in repr(KEYS)


def test_health_names_a_dead_replica(make_api):
    api = make_api()
    assert api.get("/health").json()["status"] == "ok"
    api.engine.die()
    response = api.get("/health")
    assert response.status_code == 503
    assert response.json()["models"]["echo"]["status"] == "dead"
    assert response.json()["models"]["embed"]["status"] == "ready"
    assert response.headers["retry-after"]


def test_server_without_models_is_not_ready(api_of):
    assert api_of(create_app(ServedModels())).get("/health").status_code == 503


def test_metrics_count_what_left_the_server(make_api):
    api = make_api(EchoEngine(tokens_per_delta=2))
    api.chat("hello", max_tokens=6)
    api.chat("hello", max_tokens=6, stream=True)
    text = api.get("/metrics").text
    for line in (
        'mxn_generation_tokens_total{model_name="echo"} 12.0',
        'mxn_prompt_tokens_total{model_name="echo"} 16.0',
        'mxn_request_success_total{finished_reason="length",model_name="echo"} 2.0',
        'mxn_time_to_first_token_seconds_count{model_name="echo"} 2.0',
        'mxn_inter_token_latency_seconds_count{model_name="echo"} 4.0',
        'mxn_e2e_request_latency_seconds_count{model_name="echo"} 2.0',
        'mxn_num_requests_running{model_name="echo"} 0.0',
        'mxn_num_requests_waiting{model_name="echo"} 0.0',
        'mxn_kv_cache_usage_perc{model_name="echo"} 0.0',
        'mxn_engine_up{model_name="echo"} 1.0',
    ):
        assert line in text
    api.engine.die()
    text = api.get("/metrics").text
    assert 'mxn_engine_up{model_name="echo"} 0.0' in text
    assert 'mxn_engine_up{model_name="embed"} 1.0' in text


def test_load_is_by_model_and_in_all(make_api):
    api = make_api()
    body = api.get("/load").json()
    assert body["server_load"] == 0
    assert body["models"]["echo"]["kv_pages_total"] == 4096
    api.engine.die()
    assert api.get("/load").json()["models"]["echo"] is None


def test_openapi_document_lists_exactly_the_routes(api):
    document = api.get("/openapi.json").json()
    described = {
        (path, method.upper()) for path, entry in document["paths"].items() for method in entry
    }
    real = {
        (route.path.replace(":path", ""), method)
        for route in api.app.routes
        for method in route.methods - {"HEAD"}
    }
    assert described == real - {("/openapi.json", "GET")}
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["required"] == ["messages"]
    assert schema["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    ids = [entry["operationId"] for item in document["paths"].values() for entry in item.values()]
    assert len(ids) == len(set(ids))


def test_two_models_of_one_name_are_refused():
    engine = EchoEngine()
    model = ServedModel(name="a", client=engine, tokenizer=engine.tokenizer)
    other = ServedModel(name="b", client=engine, tokenizer=engine.tokenizer, aliases=("a",))
    with pytest.raises(ConfigError, match="two models are named 'a'"):
        ServedModels([model, other])


def test_models_load_beside_the_server_and_close_with_it():
    engine, may_load = EchoEngine(), threading.Event()
    models = ServedModels()
    models.expect("late")

    async def load(models: ServedModels) -> None:
        await asyncio.to_thread(may_load.wait, 10)
        models.add(ServedModel(name="late", client=engine, tokenizer=engine.tokenizer))

    with running(create_app(models, startup=load)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 503
        body = {"model": "late", "prompt": "a"}
        assert client.post("/v1/completions", json=body).status_code == 503
        may_load.set()
        while client.get("/health").status_code != 200:
            pass
        assert client.post("/v1/completions", json=body).status_code == 200
    assert not engine.is_healthy, "closed with the server"


def test_failed_load_is_told_on_health():
    async def load(models: ServedModels) -> None:
        raise ConfigError("no such checkpoint")

    models = ServedModels()
    models.expect("bad")
    with running(create_app(models, startup=load)) as url:
        while "failed" not in (answer := httpx.get(f"{url}/health")).text:
            pass
    assert answer.status_code == 503
    assert answer.json()["models"]["bad"]["reason"] == "no such checkpoint"


def test_server_drains_a_running_stream():
    engine = EchoEngine(token_s=0.02)
    model = ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)
    body = {"model": "echo", "prompt": "abcdefgh", "max_tokens": 8, "stream": True}
    lines: list[str] = []
    with httpx.Client() as client:
        with running(create_app(ServedModels([model])), drain_s=5) as url:
            stream = client.send(
                client.build_request("POST", f"{url}/v1/completions", json=body), stream=True
            )
        # the server was told to stop while the stream ran
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert sum('"text":"' in line for line in lines) == 8


def test_busy_port_is_a_clear_error():
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match="cannot listen on"):
        bind("127.0.0.1", sock.getsockname()[1])


def test_lenient_server_takes_any_model_name_and_zero_as_unset(make_api):
    api = make_api(settings=ServeSettings(is_lenient=True), is_alone=True)
    assert api.chat(model="gpt-x", max_tokens=0).status_code == 200
    assert api.complete(model="gpt-x", max_tokens=0).json()["usage"]["completion_tokens"] == 16
    assert api.get("/v1/models").json()["data"][0]["id"] == "echo"
    assert api.get("/v1/models/gpt-x").json()["root"] == "echo"


def test_browsers_of_named_origins_may_call(make_api):
    api = make_api(settings=ServeSettings(cors_origins=("http://a.test",), api_keys=("sk-one",)))
    asks = {"origin": "http://a.test", "access-control-request-method": "POST"}
    answer = api.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert answer.headers["access-control-allow-origin"] == "http://a.test"
    other = api.request("OPTIONS", "/v1/models", headers=asks | {"origin": "http://b.test"})
    assert "access-control-allow-origin" not in other.headers
