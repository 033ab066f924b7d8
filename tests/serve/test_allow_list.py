"""A key that may use some models reaches no other, on any route and by any name."""

from __future__ import annotations

import secrets
import time

import pytest

from mxn.engine.echo import EchoEngine
from mxn.ledger import keys
from mxn.ledger.database import Database
from mxn.serve.names import permitted_name
from mxn.serve.served import ServedModel, ServedModels
from support.gateways import gateway

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
    "/maas/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allow")
    with gateway(folder) as found:
        yield found, folder


def key_for(served, *models: str) -> str:
    found, folder = served
    database = Database.open(f"sqlite:///{folder}/ledger.db")
    with database.begin() as connection:
        _, key = keys.create_key(
            connection, found.tenant.principal.project_id, name=secrets.token_hex(8), models=models,
            now_us=time.time_ns() // 1000,
        )  # fmt: skip
    database.close()
    return key


@pytest.mark.parametrize("path", list(ROUTES))
@pytest.mark.parametrize(
    ("allowed", "asked", "status"),
    [
        ("echo", "echo", 200),
        ("echo", "batch-echo", 200),
        ("echo", "echo@chip-a", 200),
        ("echo", "far", 403),
        ("far", "far", 200),
        ("far", "echo", 403),
        ("far", "batch-echo", 403),
        ("far", "echo@chip-b", 403),
    ],
)
def test_each_route_asks_the_list(served, path, allowed, asked, status):
    headers = {"authorization": f"Bearer {key_for(served, allowed)}"}
    answer = served[0].post(path, ROUTES[path] | {"model": asked}, headers=headers)
    assert answer.status_code == status, answer.text


def test_models_are_listed_as_far_as_the_key_goes(served):
    headers = {"authorization": f"Bearer {key_for(served, 'far')}"}
    found = served[0]
    listed = found.request("GET", "/v1/models", headers=headers)
    assert [model["id"] for model in listed.json()["data"]] == ["far"]
    assert found.request("GET", "/v1/models/echo", headers=headers).status_code == 404
    body = {"model": "x", "messages": MESSAGES}
    unknown = found.post("/v1/chat/completions", body, headers=headers)
    assert "echo" not in unknown.json()["error"]["message"]


def test_names_that_look_like_views_are_permitted_as_they_are():
    engine = EchoEngine()
    names = ("echo", "echo@private", "batch-private")
    models = ServedModels(
        [ServedModel(name=name, client=engine, tokenizer=engine.tokenizer) for name in names]
    )
    from mxn.serve.names import Names

    for name in names:
        found = Names().find(models, name)
        assert found is not None
        assert permitted_name(found) == name
    view = Names().find(models, "batch-echo")
    assert view is not None
    assert permitted_name(view) == "echo"


@pytest.mark.parametrize("name", ["@" * 3000, "batch-" * 3000, "x" * 100_000])
def test_absurd_names_are_unknown_models(served, name):
    answer = served[0].chat(name)
    assert answer.status_code == 404
    assert len(answer.text) < 1000
