"""LoRA adapters over HTTP: loaded and unloaded while the server runs, then models like others.

The bodies are those of vLLM. An adapter answers to its name and to its deployment id, a `mif-…`
name that stays the same on every server. Knows the replica contract and served models; knows no
tensors. Start at `AdapterRoutes`; `add_adapter` is what a start of the server uses.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.engine.protocol import AdapterLoaded, LoadAdapter, UnloadAdapter
from mxn.errors import ConfigError, ForbiddenError, UnsupportedError
from mxn.serve.http import parse
from mxn.serve.openai.errors import ApiError, model_not_found
from mxn.serve.openapi import Operation
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.state import State, new_id, require_kind

DEPLOYMENT_PREFIX = "mif-"
MAX_NAME_CHARS = 256

_LOAD = "/v1/load_lora_adapter"
_UNLOAD = "/v1/unload_lora_adapter"


class LoadLoraRequest(msgspec.Struct, kw_only=True):
    lora_name: str
    lora_path: str
    model: str | None = None  # the base model; may be left out where only one generates
    load_inplace: bool | None = None  # replace an adapter that has this name


class UnloadLoraRequest(msgspec.Struct, kw_only=True):
    lora_name: str


@runtime_checkable
class TakesAdapters(Protocol):
    """The part of a client that `EngineClient` leaves out: not every replica has adapters."""

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded: ...

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded: ...


def deployment_id(name: str) -> str:
    """Return the `mif-xxxxxxxx` that stands for a model or adapter, the same wherever it is asked.

    32 bits: two of a thousand names meet once in ten thousand servers, and loading then says so.
    """
    return DEPLOYMENT_PREFIX + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


async def add_adapter(models: ServedModels, base: ServedModel, name: str, path: str) -> None:
    """Load an adapter on every replica of `base` and serve it under `name`.

    Raises: UnsupportedError, NotFoundError, CapacityError, with the reason; ConfigError when the
    name or its deployment id is taken.
    """
    adapter = base.with_adapter(name, aliases=(deployment_id(name),))
    models.check_free(adapter)
    await takes_adapters(base).load_adapter(
        LoadAdapter(request_id=new_id("lora"), name=name, path=path)
    )
    try:
        models.add_adapter(adapter)
    except ConfigError:  # the name was taken meanwhile
        message = UnloadAdapter(request_id=new_id("lora"), name=name)
        await takes_adapters(base).unload_adapter(message)
        raise


def takes_adapters(model: ServedModel) -> TakesAdapters:
    """Return the client of a model. Raises: UnsupportedError when it takes no adapters."""
    if not isinstance(model.client, TakesAdapters):
        raise UnsupportedError(f"the replicas of model {model.name!r} take no adapters")
    return cast("TakesAdapters", model.client)


def adapter_operations(state: State) -> list[Operation]:
    """Return the rows of the route table."""
    routes = AdapterRoutes(state)

    def row(path: str, handler: Callable[[Request], Awaitable[Response]], summary: str, body: type):
        return Operation(
            method="POST",
            path=path,
            handler=handler,
            summary=summary,
            request=body,
            media_type="text/plain",
        )

    return [
        row(_LOAD, routes.load, "Load a LoRA adapter from a folder", LoadLoraRequest),
        row(_UNLOAD, routes.unload, "Unload a LoRA adapter when it is idle", UnloadLoraRequest),
    ]


class AdapterRoutes:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; the gateway checks the scope."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._loading: set[str] = set()

    async def load(self, request: Request) -> Response:
        body = await parse(request, LoadLoraRequest, self._state.settings.max_body_bytes)
        name = _checked_name(body.lora_name)
        path = allowed_path(body.lora_path, self._state.settings.adapter_folder)
        base = self._base(body.model)
        if name in self._loading:
            raise ApiError(f"The lora adapter {name!r} is being loaded.", param="lora_name")
        self._loading.add(name)
        add = self._add(base, name, path, replaces=bool(body.load_inplace))
        task = asyncio.ensure_future(add)
        task.add_done_callback(lambda _: self._loading.discard(name))
        # Shielded: a client that hangs up leaves no adapter behind that has no name.
        await asyncio.shield(task)
        return _success(name, "added")

    async def unload(self, request: Request) -> Response:
        body = await parse(request, UnloadLoraRequest, self._state.settings.max_body_bytes)
        adapter = self._state.models.remove_adapter(body.lora_name)
        if adapter is None:
            raise _not_found(body.lora_name, self._state.models)
        message = UnloadAdapter(request_id=new_id("lora"), name=adapter.name)
        # Gone from the names at once; a client that hangs up does not bring it back.
        await asyncio.shield(takes_adapters(adapter).unload_adapter(message))
        return _success(adapter.name, "removed")

    async def _add(self, base: ServedModel, name: str, path: str, *, replaces: bool) -> None:
        models = self._state.models
        before = models.adapter(name)
        if before is None:
            await add_adapter(models, base, name, path)
            return
        if not replaces or before.client is not base.client:
            raise ApiError(
                f"The lora adapter {name!r} is loaded already, for {before.parent!r}; unload it"
                " first, or send load_inplace for the same model.",
                param="lora_name",
                code="adapter_exists",
            )
        message = LoadAdapter(request_id=new_id("lora"), name=name, path=path)
        await takes_adapters(base).load_adapter(message)

    def _base(self, name: str | None) -> ServedModel:
        """Return the model to adapt. Raises: ApiError, ForbiddenError."""
        if name is None:
            decoders = [model for model in self._state.models if model.info.kind == "decoder"]
            name = decoders[0].name if len(decoders) == 1 else None
        model = self._state.models.get(name) if name else self._state.find(None)
        if model is None:
            raise model_not_found(name or "", self._state.models.names())
        if model.parent is not None:
            raise ApiError(f"{model.name!r} is an adapter itself.", param="model")
        require_kind(model, "decoder")
        return model


def allowed_path(path: str, folder: str | None) -> str:
    """Return the folder to load, which must lie in `folder` where one is set.

    A relative path is one in `folder`; links are followed before they are judged.
    Raises: ForbiddenError.
    """
    if folder is None:
        return path
    root = Path(folder).expanduser().resolve()
    wanted = Path(os.path.expanduser(path))
    resolved = (root / wanted).resolve()
    if not resolved.is_relative_to(root):
        raise ForbiddenError(
            f"lora_path {path!r} is outside of the folder that adapters may be loaded from",
            hint="the operator sets it with --lora-folder",
        )
    return str(resolved)


def _checked_name(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_CHARS:
        raise ApiError(
            f"lora_name has 1 to {MAX_NAME_CHARS} printable characters, got {name[:40]!r}.",
            param="lora_name",
        )
    return name


def _not_found(name: str, models: ServedModels) -> ApiError:
    loaded = ", ".join(repr(model.name) for model in models.adapters()) or "none"
    return ApiError(
        f"The lora adapter {name!r} cannot be found. Loaded: {loaded}.",
        status=404,
        param="lora_name",
        code="adapter_not_found",
    )


def _success(name: str, what: str) -> Response:
    return Response(f"Success: LoRA adapter '{name}' {what} successfully.", media_type="text/plain")
