"""GET /health, /load, /metrics and /version: what operators and probes ask."""

from __future__ import annotations

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import mxn
from mxn.engine.protocol import EngineStats
from mxn.errors import MxnError
from mxn.serve.http import json_response
from mxn.serve.openai.errors import RETRY_AFTER_S
from mxn.serve.served import ServedModel
from mxn.serve.state import State

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
        if self._state.is_draining:
            body = {"status": "draining", "models": models}
            return json_response(body, {"retry-after": str(RETRY_AFTER_S)}, status=503)
        is_ready = bool(models) and all(item["status"] == "ready" for item in models.values())
        body = {"status": "ok" if is_ready else "unavailable", "models": models}
        if is_ready:
            return json_response(body)
        return json_response(body, {"retry-after": str(RETRY_AFTER_S)}, status=503)

    async def load(self, request: Request) -> Response:
        """Requests and pages in use, in all and by model; null where a replica does not answer."""
        stats = await self._stats()
        answered = [item for item in stats.values() if item is not None]
        total = sum(item.num_running + item.num_waiting for item in answered)
        models = {
            name: item
            and {
                "running": item.num_running,
                "waiting": item.num_waiting,
                "kv_pages_used": item.kv_pages_used,
                "kv_pages_total": item.kv_pages_total,
            }
            for name, item in stats.items()
        }
        return json_response({"server_load": total, "models": models})

    async def metrics(self, request: Request) -> Response:
        for name, stats in (await self._stats()).items():
            self._state.metrics.set_gauges(name, stats)
        return Response(self._state.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        return json_response({"version": mxn.__version__})

    async def _stats(self) -> dict[str, EngineStats | None]:
        models = list(self._state.models)
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
