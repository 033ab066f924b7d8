"""Starts replicas and puts them behind the HTTP application. Start at `load_models`.

Knows engine settings and served models; the HTTP server itself is `server.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mxn.engine.client import ProcessEngine
from mxn.engine.config import KV_FRACTION, KV_FRACTION_HOST, EngineConfig
from mxn.engine.protocol import Loading
from mxn.errors import ConfigError, MxnError
from mxn.serve.adapters import add_adapter
from mxn.serve.fleet import PoolRules, Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.served import ServedModel, ServedModels

_FULL = 2  # times the sequences of one step: the engine always has the next ones at hand

log = logging.getLogger("mxn.serve")

Progress = Callable[[str, Loading], None]
"""Called with (model name, progress)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One model to serve: the name callers use, and how to run it."""

    name: str
    config: EngineConfig
    aliases: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()  # (name, folder), loaded before it is served
    devices: tuple[str, ...] = ()  # one replica on each; empty: one on `config.device`
    rules: PoolRules | None = None


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
    pool: PooledClient | None = None
    try:
        pool = await start_pool(served, request, on_progress)
        folder = request.config.model
        # In a thread: reading a large tokenizer must not hold up the models that are ready.
        model = await asyncio.to_thread(
            ServedModel.load, request.name, pool, folder, aliases=request.aliases
        )
        for name, path in request.adapters:
            await add_adapter(served, model, name, path)
        served.add(model)
    except BaseException as error:
        if isinstance(error, MxnError):
            log.error("%s cannot be served: %s", request.name, error)
            served.report_failure(request.name, str(error))
        for adapter in served.adapters():
            if adapter.client is pool:
                served.remove_adapter(adapter.name)
        if pool:  # nobody else knows it yet
            await pool.close()
        raise


async def start_pool(
    served: ServedModels, request: ModelRequest, on_progress: Progress | None = None
) -> PooledClient:
    """Start all replicas at the same time. Raises: the first failure, with none left behind."""
    configs = replica_configs(request)

    def report_for(number: int) -> Callable[[Loading], None]:
        shown = request.name if len(configs) == 1 else f"{request.name} {number}"

        def report(loading: Loading) -> None:
            if number == 0:
                served.report_progress(request.name, loading)
            if on_progress:
                on_progress(shown, loading)

        return report

    starts = [
        asyncio.create_task(ProcessEngine.start(config, on_progress=report_for(number)))
        for number, config in enumerate(configs)
    ]
    try:
        engines = await asyncio.gather(*starts)
        return PooledClient(
            [
                Replica(
                    id=f"{request.name}-{number}",
                    client=engine,
                    max_in_flight=_FULL * engine.config.max_sequences,
                )
                for number, engine in enumerate(engines)
            ],
            request.rules,
        )
    except BaseException:
        for start in starts:
            start.cancel()
        ended = await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(e.close() for e in ended if isinstance(e, ProcessEngine)))
        raise


def replica_configs(request: ModelRequest) -> list[EngineConfig]:
    """Return the settings of each replica; those on one machine share its cores and memory."""
    config, devices = request.config, request.devices or (request.config.device,)
    if len(devices) == 1:
        return [dataclasses.replace(config, device=devices[0])]
    threads = config.threads or max(1, config.num_threads // len(devices))
    configs = []
    for device in devices:
        same = devices.count(device)
        fraction = config.kv_fraction
        if same > 1 and fraction is None and config.kv_bytes is None:
            is_host = device.partition(":")[0] in ("auto", "cpu")
            fraction = (KV_FRACTION_HOST if is_host else KV_FRACTION) / same
        configs.append(
            dataclasses.replace(config, device=device, threads=threads, kv_fraction=fraction)
        )
    return configs


def spread(device: str, replicas: int | None) -> tuple[str, ...]:
    """Return the device of each replica.

    `device` may be a list such as `cuda:0,cuda:1`; without `replicas` each gets one, with it they
    are filled in turn. Several replicas on `auto` use all devices of the best chip.
    Raises: ConfigError, NotFoundError when there is no device.
    """
    named = tuple(part.strip() for part in device.split(","))
    if not all(named):
        raise ConfigError(f"--device {device!r} has an empty name", hint="such as cuda:0,cuda:1")
    count = len(named) if replicas is None else replicas
    if count < len(named):
        raise ConfigError(
            f"{len(named)} devices but {count} replicas: {device}",
            hint="give --replicas at least as many as devices, or leave it out",
        )
    if count > 1 and named == ("auto",):
        from mxn.chips.discovery import choose_best, detect

        devices = detect()
        best = choose_best(devices)
        named = tuple(found.id for found in devices if found.chip == best.chip)
    return tuple(named[number % len(named)] for number in range(count))
