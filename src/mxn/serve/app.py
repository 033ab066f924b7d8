"""Builds the HTTP application from served models and settings. Start at `create_app`.

Routes are plain ASGI endpoints: bodies are checked by msgspec, not by the framework, so that errors
have OpenAI's shape and a streamed token costs one small encode.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import mxn
from mxn.serve.accounting import Accounting
from mxn.serve.dialects import response_on
from mxn.serve.gateway import Gateway, OnEnd
from mxn.serve.http import Endpoint, stop
from mxn.serve.metering import settled
from mxn.serve.openai.errors import from_exception
from mxn.serve.routes import operations
from mxn.serve.served import ServedModels
from mxn.serve.settings import ServeSettings
from mxn.serve.state import State

if TYPE_CHECKING:
    from mxn.serve.tracing import Tracing

Startup = Callable[[ServedModels], Awaitable[None]]


class App(FastAPI):
    """A FastAPI application whose requests pass our own front first.

    FastAPI's and Starlette's layers do nothing for routes with a fixed path, since bodies, errors
    and headers are ours; they cost a third of a millisecond-sized request.
    """

    front: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.front is None or scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        await self.front(scope, receive, send)

    async def serve_rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what has a variable path, is unknown, or has the wrong method."""
        await super().__call__(scope, receive, send)


class Dispatch:
    """Calls the endpoint of a fixed path at once, and leaves the rest to the framework."""

    def __init__(self, routes: Sequence[BaseRoute], rest: ASGIApp) -> None:
        self._rest = rest
        self._endpoints: dict[tuple[str, str], ASGIApp] = {
            (method, route.path): route.endpoint
            for route in routes
            if isinstance(route, Route) and "{" not in route.path
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"]))
        await (endpoint or self._rest)(scope, receive, send)


def create_app(
    models: ServedModels,
    settings: ServeSettings | None = None,
    *,
    startup: Startup | None = None,
    accounting: Accounting | None = None,
    tracing: Tracing | None = None,
    on_end: Sequence[OnEnd] = (),
) -> FastAPI:
    """Return the application.

    With `accounting`, keys, budgets, usage, files, batches and answers are in its database.
    `tracing` makes spans of requests; each of `on_end` is called when a request is over.

    `startup` runs beside the server from its start, to load models that were promised with
    `models.expect(name)`; meanwhile /health answers 503. At the end the replicas are closed.
    """
    settings = settings or ServeSettings()
    state = State(models, settings)
    if accounting is not None:
        state.stores = accounting.stores(lambda: app)
    app = App(
        title="mxn",
        version=mxn.__version__,
        openapi_url=None,  # ours is made from the types that are really checked
        routes=_routes(state),
        redirect_slashes=False,
        lifespan=_lifespan(state, startup, accounting, tracing),
        exception_handlers={HTTPException: _http_error},
    )
    app.state.mxn = state
    state.metrics.registry.register(state.traffic)
    state.traffic.metrics = state.metrics
    state.traffic.paths = frozenset(operation.path for operation in operations(state))
    front: ASGIApp = Gateway(
        Dispatch(app.routes, app.serve_rest),
        api_keys=settings.api_keys,
        ledger=lambda: state.ledger,
        request_timeout_s=settings.request_timeout_s,
        max_requests=settings.max_requests,
        traffic=state.traffic,
        on_begin=None if tracing is None else tracing.on_begin,
        on_end=(state.traffic.ended, *([] if tracing is None else [tracing.on_end]), *on_end),
    )
    if settings.cors_origins:
        front = CORSMiddleware(
            front,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-mxn-model", "x-mxn-device", "x-mxn-chip"],
        )
    app.front = front
    return app


def _routes(state: State) -> list[BaseRoute]:
    return [
        Route(operation.path, Endpoint(operation.handler), methods=[operation.method])
        for operation in operations(state)
    ]


async def _http_error(request: Request, exc: Exception) -> Response:
    return response_on(request.url.path, from_exception(exc))


def _lifespan(
    state: State,
    startup: Startup | None,
    accounting: Accounting | None,
    tracing: Tracing | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    models = state.models

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if accounting is not None:
            state.ledger = await accounting.start()
        loading = asyncio.create_task(_load(models, startup)) if startup else None
        if state.stores.worker is not None:
            state.stores.worker.start()
        state.stores.background.start()
        try:
            yield
        finally:
            if loading is not None:
                await stop(loading)
            await _end(state, accounting, tracing)

    return lifespan


async def _end(state: State, accounting: Accounting | None, tracing: Tracing | None) -> None:
    """Stop what works, then close what it wrote to; each step within a limit of its own."""
    await state.stores.background.stop()
    if state.stores.worker is not None:
        await state.stores.worker.stop()
    await state.models.close()
    await state.upstreams.close()
    await settled()
    if accounting is not None:
        await accounting.close()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)


async def _load(models: ServedModels, startup: Startup) -> None:
    """Run `startup`; what it could not load says why on /health instead of loading for ever."""
    try:
        await startup(models)
    except Exception as exc:
        reason = from_exception(exc).message
        for name in models.pending:
            if models.pending[name].failure is None:
                models.report_failure(name, reason)
