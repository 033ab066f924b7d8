"""Starts replicas and puts them behind the HTTP application. Start at `load_models`.

Knows engine settings and served models; the HTTP server itself is `server.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
from mxn.engine.protocol import Loading
from mxn.errors import ConfigError, MxnError
from mxn.serve.served import ServedModel, ServedModels

log = logging.getLogger("mxn.serve")

Progress = Callable[[str, Loading], None]
"""Called with (model name, progress)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One model to serve: the name callers use, and how to run it."""

    name: str
    config: EngineConfig
    aliases: tuple[str, ...] = ()


def check_names(requests: list[ModelRequest]) -> None:
    """Raises: ConfigError when a name is empty or two models have it. Loads nothing."""
    seen: set[str] = set()
    for request in requests:
        names = {request.name, *request.aliases}
        taken = sorted(names & seen)
        if taken:
            raise ConfigError(f"two models are named {taken[0]!r}", hint="give one another --name")
        if "" in names:
            raise ConfigError(f"the model {request.config.model} has an empty name")
        seen |= names


async def load_models(
    served: ServedModels, requests: list[ModelRequest], on_progress: Progress | None = None
) -> None:
    """Load all models at the same time and add each to `served` when it is ready.

    A model that cannot be loaded is reported there, and its reason stands in /health. Raises: the
    first such error when no model could be loaded at all.
    """
    check_names(requests)
    for request in requests:
        served.expect(request.name)
    results = await asyncio.gather(
        *(_load(served, request, on_progress) for request in requests), return_exceptions=True
    )
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        if not isinstance(failure, MxnError):
            raise failure
    if failures and len(failures) == len(requests):
        raise failures[0]


async def _load(served: ServedModels, request: ModelRequest, on_progress: Progress | None) -> None:
    def report(loading: Loading) -> None:
        served.report_progress(request.name, loading)
        if on_progress:
            on_progress(request.name, loading)

    client: ProcessEngine | None = None
    try:
        client = await ProcessEngine.start(request.config, on_progress=report)
        folder = request.config.model
        # In a thread: reading a large tokenizer must not hold up the models that are ready.
        model = await asyncio.to_thread(
            ServedModel.load, request.name, client, folder, aliases=request.aliases
        )
        served.add(model)
    except BaseException as error:
        if isinstance(error, MxnError):
            log.error("%s cannot be served: %s", request.name, error)
            served.report_failure(request.name, str(error))
        if client:  # nobody else knows it yet
            await client.close()
        raise
