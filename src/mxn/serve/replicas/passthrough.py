"""Decides for each request whether a foreign server's model answers it, before anything is parsed.

Wraps the handlers of routes: `PassThrough.around`. Without such models a request costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.errors import ConfigError, ForbiddenError
from mxn.ledger.types import Ledger
from mxn.serve.context import current
from mxn.serve.http import Handler, read_body
from mxn.serve.replicas.upstream_chat import UpstreamModel

Route = Literal["chat", "completions", "embeddings"]


class _Named(msgspec.Struct):
    model: str | None = None


_decoder = msgspec.json.Decoder(_Named)


class UpstreamModels:
    """Models of foreign servers, by name and alias."""

    def __init__(self, models: Iterable[UpstreamModel] = ()) -> None:
        self._by_name: dict[str, UpstreamModel] = {}
        for model in models:
            self.add(model)

    def add(self, model: UpstreamModel) -> None:
        """Raises: ConfigError when one of its names is taken."""
        for name in (model.name, *model.aliases):
            if name in self._by_name:
                raise ConfigError(f"two models are named {name!r}", hint="give one another name")
        for name in (model.name, *model.aliases):
            self._by_name[name] = model

    def get(self, name: str) -> UpstreamModel | None:
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[UpstreamModel]:
        return iter(dict.fromkeys(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    async def close(self) -> None:
        for model in self:
            await model.close()


class PassThrough:
    """Sends requests for foreign models to them and leaves the others to our own handlers."""

    def __init__(
        self,
        models: UpstreamModels,
        max_body_bytes: int,
        ledger: Callable[[], Ledger | None] = lambda: None,
    ) -> None:
        """`ledger` is asked for each request, since it is opened after the routes are made."""
        self._models = models
        self._max_body_bytes = max_body_bytes
        self._ledger = ledger

    def around(self, route: Route, handler: Handler) -> Handler:
        """Return `handler` for our own models, pass-through for foreign ones."""

        async def handle(request: Request) -> Response:
            if not len(self._models):
                return await handler(request)
            body = await read_body(request, self._max_body_bytes)
            model = self._model(body)
            if model is None:
                request._body = body  # what `request.stream()` gives to the handler
                return await handler(request)
            return await self.answer(route, model, request, body)

        return handle

    async def answer(
        self, route: Route, model: UpstreamModel, request: Request, body: bytes
    ) -> Response:
        """Answer with `model`. Raises: ForbiddenError, ApiError, MxnError."""
        context = current()
        context.model = model.name
        principal = context.principal
        if principal is not None and not principal.may_use(model.name):
            raise ForbiddenError(f"this key may not use the model {model.name!r}")
        ledger = self._ledger()
        if route == "chat":
            return await model.chat(request, body, ledger)
        if route == "completions":
            return await model.completions(request, body, ledger)
        return await model.embeddings(request, body, ledger)

    def _model(self, body: bytes) -> UpstreamModel | None:
        try:
            name = _decoder.decode(body).model
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None  # the handler says what is wrong with it
        return None if name is None else self._models.get(name)
