"""GET /health, /load, /metrics and /version: what operators and probes ask."""

from __future__ import annotations

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import mxn
from mxn.engine.protocol import EngineStats
from mxn.errors import MxnError
from mxn.serve.context import current
from mxn.serve.fleet import Seat
from mxn.serve.http import json_response
from mxn.serve.openai.errors import RETRY_AFTER_S
from mxn.serve.peers import Told, merge_metrics, merge_replicas
from mxn.serve.pooled import PooledClient
from mxn.serve.replica_status import ReplicaState, ReplicaStatus
from mxn.serve.replicas.upstream import Upstream
from mxn.serve.served import ServedModel
from mxn.serve.state import State

_PRIVATE = (b"mxn_cost_micro", b"mxn_replica_")  # names of organizations and addresses of replicas
_STATS_TIMEOUT_S = 2.0  # a busy engine answers between two steps


class StatusRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def health(self, request: Request) -> Response:
        """200 when every promised model answers; else 503, and the body says which does not."""
        models: dict[str, dict[str, object]] = {}
        for model in self._state.models:
            models[model.name] = {"status": "ready" if model.client.is_healthy else "dead"}
        for name, pending in self._state.models.pending.items():
            models[name] = {"status": "loading" if pending.failure is None else "failed"}
            if pending.failure is not None:
                models[name]["reason"] = pending.failure
            if pending.progress is not None:
                models[name]["progress"] = pending.progress
        for upstream in self._state.upstreams:
            models[upstream.name] = {"status": "ready" if upstream.is_healthy else "dead"}
        for row in replica_rows(self._state) if self._may_see_all() else ():
            replicas = models[row.model].setdefault("replicas", [])
            assert isinstance(replicas, list)
            replicas.append({"name": row.name, "chip": row.chip, "state": row.state})
        if self._state.is_draining:
            body = {"status": "draining", "models": models}
            return json_response(body, {"retry-after": str(RETRY_AFTER_S)}, status=503)
        is_ready = bool(models) and all(item["status"] == "ready" for item in models.values())
        body = {"status": "ok" if is_ready else "unavailable", "models": models}
        if is_ready:
            return json_response(body)
        return json_response(body, {"retry-after": str(RETRY_AFTER_S)}, status=503)

    async def load(self, request: Request) -> Response:
        """Requests and pages in use, in all, by model and by replica; null: it does not answer."""
        state = self._state
        stats = await _stats(state)
        queued, rows = queued_by_model(state), replica_rows(state)
        if state.peers is not None:
            told = await state.peers.ask(Told(metrics="", queued=queued, replicas=rows))
            queued = {name: sum(t.queued.get(name, 0) for t in told.values()) for name in queued}
            rows = merge_replicas(told, state.peers.index)
        models = {name: item and _load_of(item, queued[name]) for name, item in stats.items()}
        for upstream in state.upstreams:
            running = sum(row.running for row in rows if row.model == upstream.name)
            models[upstream.name] = _load_of(EngineStats(num_running=running), 0)
        total = sum(
            item["running"] + item["waiting"] + item["queued"]
            for item in models.values()
            if item is not None
        )
        return json_response({"server_load": total, "models": models, "replicas": rows})

    async def metrics(self, request: Request) -> Response:
        """Of all workers, if there are several: then each sample says whose it is."""
        peers, own = self._state.peers, await tell(self._state)
        if peers is None:
            text = own.metrics.encode()
        else:
            told = await peers.ask(own)
            text = merge_metrics({index: item.metrics for index, item in told.items()})
        if not self._may_see_all():
            text = _without(text, _PRIVATE)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    def _may_see_all(self) -> bool:
        """Whether the caller may know who spent what, and where replicas are.

        Without keys everybody may; with them, those who have one of the scope `admin`.
        """
        if self._state.ledger is None:
            return True
        principal = current().principal
        return principal is not None and "admin" in principal.scopes

    async def version(self, request: Request) -> Response:
        return json_response({"version": mxn.__version__})


def _without(text: bytes, families: tuple[bytes, ...]) -> bytes:
    """Return an exposition without the samples of some families."""
    lines = text.split(b"\n")
    return b"\n".join(line for line in lines if not line.startswith(families))


async def tell(state: State) -> Told:
    """Return what this process counted, with its replicas as they are now."""
    for name, stats in (await _stats(state)).items():
        state.metrics.set_gauges(name, stats)
    rows, queued = replica_rows(state), queued_by_model(state)
    state.metrics.replicas.rows, state.metrics.replicas.queued = rows, queued
    return Told(metrics=state.metrics.text().decode(), queued=queued, replicas=rows)


async def _stats(state: State) -> dict[str, EngineStats | None]:
    models = list(state.models)
    results = await asyncio.gather(*(_stats_of(model) for model in models))
    return {model.name: result for model, result in zip(models, results, strict=True)}


async def _stats_of(model: ServedModel) -> EngineStats | None:
    """Return a replica's state, or None: a dead replica must not take the others' numbers along."""
    if not model.client.is_healthy:
        return None
    try:
        return await asyncio.wait_for(model.client.stats(), _STATS_TIMEOUT_S)
    except (TimeoutError, MxnError):
        return None


def _load_of(stats: EngineStats, queued: int) -> dict[str, int]:
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "queued": queued,
        "kv_pages_used": stats.kv_pages_used,
        "kv_pages_total": stats.kv_pages_total,
    }


def queued_by_model(state: State) -> dict[str, int]:
    """Return how many requests of each model wait for a replica with room."""
    clients = {model.name: model.client for model in state.models}
    return {
        name: client.num_queued if isinstance(client, PooledClient) else 0
        for name, client in clients.items()
    }


def replica_rows(state: State) -> list[ReplicaStatus]:
    """Return the replicas of pools and the foreign servers, as they were last seen."""
    rows = []
    for model in state.models:
        client = model.client
        if isinstance(client, PooledClient):
            now_s = client.now_s
            rows += [_row_of_seat(model.name, seat, now_s) for seat in client.seats()]
    for model in state.upstreams:
        rows += [_row_of_upstream(state, model.name, server) for server in model.upstreams.all]
    return rows


def _row_of_seat(model: str, seat: Seat, now_s: float) -> ReplicaStatus:
    return ReplicaStatus(
        model=model,
        name=seat.id,
        chip=seat.replica.chip,
        state=_state_of(seat, now_s),
        running=max(0, seat.load - seat.waiting),
        waiting=seat.waiting,
        kv_used=seat.kv_used,
        tokens=seat.num_tokens,
        lost=seat.num_lost,
    )


def _state_of(seat: Seat, now_s: float) -> ReplicaState:
    """Return `Seat.state` as one of a few words."""
    if seat.is_draining:
        return "draining"
    if not seat.replica.client.is_healthy:
        return "down"
    if not seat.breaker.allows(now_s):
        return "failing"
    return "up" if seat.health.is_up else "held"


def _row_of_upstream(state: State, model: str, server: Upstream) -> ReplicaStatus:
    key = (model, server.name)
    return ReplicaStatus(
        model=model,
        name=server.name,
        chip=server.config.chip,
        state="up" if server.is_healthy else "failing",
        running=server.num_running,
        waiting=None,  # only the server itself knows
        kv_used=None,
        tokens=int(state.traffic.made.values.get(key, 0)),
        lost=int(state.traffic.lost.values.get(key, 0)),
    )
