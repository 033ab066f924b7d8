"""Builds the HTTP application from served models and settings. Start at `create_app`.

Routes are plain ASGI endpoints: bodies are checked by msgspec, not by the framework, so that errors
have OpenAI's shape and a streamed token costs one small encode.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import mxn
from mxn.serve.dialects import response_on
from mxn.serve.gateway import Gateway
from mxn.serve.http import Endpoint, stop
from mxn.serve.openai.errors import from_exception
from mxn.serve.routes import operations
from mxn.serve.served import ServedModels
from mxn.serve.settings import ServeSettings
from mxn.serve.state import State

Startup = Callable[[ServedModels], Awaitable[None]]


def create_app(
    models: ServedModels,
    settings: ServeSettings | None = None,
    *,
    startup: Startup | None = None,
) -> FastAPI:
    """Return the application.

    `startup` runs beside the server from its start, to load models that were promised with
    `models.expect(name)`; meanwhile /health answers 503. At the end the replicas are closed.
    """
    settings = settings or ServeSettings()
    state = State(models, settings)
    app = FastAPI(
        title="mxn",
        version=mxn.__version__,
        openapi_url=None,  # ours is made from the types that are really checked
        routes=_routes(state),
        redirect_slashes=False,
        lifespan=_lifespan(models, startup),
        exception_handlers={HTTPException: _http_error},
    )
    app.state.mxn = state
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-mxn-model", "x-mxn-device"],
        )
    app.add_middleware(Gateway, api_keys=settings.api_keys)
    return app


def _routes(state: State) -> list[BaseRoute]:
    return [
        Route(operation.path, Endpoint(operation.handler), methods=[operation.method])
        for operation in operations(state)
    ]


async def _http_error(request: Request, exc: Exception) -> Response:
    return response_on(request.url.path, from_exception(exc))


def _lifespan(
    models: ServedModels, startup: Startup | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(models, startup)) if startup else None
        try:
            yield
        finally:
            if loading is not None:
                await stop(loading)
            await models.close()
            await app.state.mxn.upstreams.close()

    return lifespan


async def _load(models: ServedModels, startup: Startup) -> None:
    """Run `startup`; what it could not load says why on /health instead of loading for ever."""
    try:
        await startup(models)
    except Exception as exc:
        reason = from_exception(exc).message
        for name in models.pending:
            if models.pending[name].failure is None:
                models.report_failure(name, reason)
