"""A gateway as operators run it: two replicas of one model, a foreign server, a real ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mxn.engine.echo import EchoEngine
from mxn.ledger.database import Database
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.fleet import PoolRules, Replica
from mxn.serve.gateway import OnEnd
from mxn.serve.pooled import PooledClient
from mxn.serve.replicas.upstream import UpstreamConfig
from mxn.serve.replicas.upstream_chat import UpstreamModel
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.tracing import Tracing
from support.ledgers import Tenant, make_tenant

DEAD = "http://127.0.0.1:1"  # nobody listens there


@dataclass
class Gateway:
    url: str
    engines: list[EchoEngine]
    pool: PooledClient
    tenant: Tenant
    foreign_url: str

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.tenant.key}"} | options.pop("headers", {})
        return httpx.post(self.url + path, json=body, headers=headers, timeout=20, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=20, **options)

    def get(self, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.tenant.key}"}
        return httpx.get(self.url + path, headers=headers, timeout=20)

    def chat(self, model: str = "echo", text: str = "hello there", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        options = {"headers": more.pop("headers", {})}
        return self.post("/v1/chat/completions", body | more, **options)

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Return every sample of /metrics that an admin sees, by name and labels."""
        text = self.get("/metrics").text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.scrape().get((name, frozenset(labels.items())))


@contextmanager
def gateway(
    folder: Path,
    engines: Sequence[EchoEngine] = (),
    on_end: Sequence[OnEnd] = (),
    tracing: Tracing | None = None,
) -> Iterator[Gateway]:
    """Serve `echo` on chips chip-a and chip-b, and `far` on a server of another kind."""
    engines = list(engines) or [EchoEngine(), EchoEngine()]
    replicas = [
        Replica(id=f"echo-{at}", client=engine, chip=f"chip-{'ab'[at]}")
        for at, engine in enumerate(engines)
    ]
    pool = PooledClient(replicas, PoolRules(recover_s=0.2))
    models = ServedModels([ServedModel(name="echo", client=pool, tokenizer=engines[0].tokenizer)])
    database = Database.open(f"sqlite:///{folder}/ledger.db")
    tenant = make_tenant(database)
    tenant.price("input", 1_000_000)
    tenant.price("output", 2_000_000)
    far = EchoEngine()
    far_models = ServedModels([ServedModel(name="theirs", client=far, tokenizer=far.tokenizer)])
    with running(create_app(far_models)) as foreign_url:
        accounting = Accounting(Database(str(database.url)))
        app = create_app(models, accounting=accounting, on_end=on_end, tracing=tracing)
        servers = [
            UpstreamConfig(url=DEAD, model="theirs", name="gone"),
            UpstreamConfig(url=foreign_url, model="theirs", name="works", chip="chip-c"),
        ]
        app.state.mxn.upstreams.add(UpstreamModel("far", servers))
        with running(app) as url:
            yield Gateway(url, engines, pool, tenant, foreign_url)
    database.close()
