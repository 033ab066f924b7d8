"""What llama-server's tests need besides mxn's own routes: shorter paths, and the rendered prompt.

Test equipment, not a part of mxn. Paths without /v1 lead to those with it, and `/apply-template`
shows what mxn's own chat templates render. Everything else reaches mxn unchanged.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mxn.serve.chat.prompt import render
from mxn.serve.http import json_response
from mxn.serve.openai.errors import from_exception
from mxn.serve.openai.types import ChatRequest
from mxn.serve.served import ServedModels

_SHORT = ("/chat/completions", "/completions", "/embeddings", "/models", "/responses", "/messages")


class LlamaServerPaths:
    def __init__(self, app: ASGIApp, models: ServedModels, kwargs: dict[str, Any]) -> None:
        self._app = app
        self._models = models
        self._kwargs = kwargs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == "/apply-template":
            await self._apply_template(scope, receive, send)
            return
        if path in _SHORT:
            scope = scope | {"path": f"/v1{path}", "raw_path": f"/v1{path}".encode()}
        await self._app(scope, receive, send)

    async def _apply_template(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raw: dict[str, Any] = msgspec.json.decode(await Request(scope, receive).body())
            body = msgspec.convert(
                {"model": "any", "chat_template_kwargs": self._kwargs, **raw}, ChatRequest
            )
            model = self._models.only()
            assert model is not None, "this server has one model"
            response = json_response({"prompt": render(body, model, raw.get("tools") or None)})
        except Exception as exc:
            response = from_exception(exc).response()
        await response(scope, receive, send)
