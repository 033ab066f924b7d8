"""The routes under /maas: a model on a chip by path, and the others' paths with flat errors.

Bodies and answers are those of /v1; a path that names a model wins over the body's field. Errors
are said flat (`flat.py`), which `dialects` sees to. Start at `maas_operations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.http import Handler, read_body
from mxn.serve.openai.errors import model_not_found
from mxn.serve.openapi import Operation
from mxn.serve.state import State

PREFIX = "/maas"
DEPLOYMENT_PREFIX = "mif-"

_CHAT = "/v1/chat/completions"
_SAME = (_CHAT, "/v1/embeddings", "/v1/rerank", "/v1/models")


def maas_operations(state: State, table: Sequence[Operation]) -> list[Operation]:
    """Return the rows for the route table; `table` holds those of /v1, whose handlers they use."""
    of_path = {operation.path: operation for operation in table}
    rows = [_moved(of_path[path], PREFIX + path) for path in _SAME if path in of_path]
    chat = of_path[_CHAT]
    limit = state.settings.max_body_bytes

    async def deployment(request: Request) -> Response:
        name = request.path_params["deployment"]
        known = _deployments(state)
        if name not in known:
            raise model_not_found(name, known)
        return await _with_model(chat.handler, request, name, limit)

    async def pair(request: Request) -> Response:
        name = f"{request.path_params['model']}@{request.path_params['chip']}"
        return await _with_model(chat.handler, request, name, limit)

    rows.append(
        _moved(
            chat,
            f"{PREFIX}/deployment/{{deployment}}/chat/completions",
            handler=deployment,
            summary="Answer a conversation with a deployment of one's own",
        )
    )
    rows.append(
        _moved(
            chat,
            f"{PREFIX}/{{model:path}}/{{chip}}/chat/completions",
            handler=pair,
            summary="Answer a conversation with a model on a chip",
        )
    )
    return rows


def _moved(operation: Operation, path: str, **changes: Any) -> Operation:
    return replace(operation, path=path, **changes)


def _deployments(state: State) -> list[str]:
    models = state.models.all()
    names: Iterable[str] = (name for model in models for name in (model.name, *model.aliases))
    return [name for name in names if name.startswith(DEPLOYMENT_PREFIX)]


async def _with_model(handler: Handler, request: Request, name: str, max_bytes: int) -> Response:
    """Call `handler` with a body whose `model` is the one of the path."""
    body = await read_body(request, max_bytes)
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # the handler says what is wrong with it
    else:
        fields["model"] = msgspec.Raw(msgspec.json.encode(name))
        body = msgspec.json.encode(fields)
    request._body = body  # what `request.stream()` gives to the handler
    return await handler(request)
