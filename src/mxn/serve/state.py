"""What every handler of one app shares, and how a handler finds its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from starlette.requests import Request

from mxn.errors import ForbiddenError
from mxn.ledger.types import Ledger
from mxn.serve.context import current
from mxn.serve.http import parse
from mxn.serve.metrics import Metrics
from mxn.serve.names import Names, base_name, permitted_name
from mxn.serve.openai.errors import ApiError, model_not_found, unavailable
from mxn.serve.openai.types import ModelRequest
from mxn.serve.peers import Peers
from mxn.serve.replicas.passthrough import UpstreamModels
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.settings import ServeSettings
from mxn.serve.stores import Stores
from mxn.serve.traffic import Traffic

R = TypeVar("R", bound=ModelRequest)
Kind = Literal["decoder", "embedder", "reranker"]

_ROUTE_FOR = {
    "decoder": "/v1/completions or /v1/chat/completions",
    "embedder": "/v1/embeddings",
    "reranker": "/v1/rerank or /v1/score",
}


@dataclass(slots=True)
class State:
    """Models, settings and metrics of one app."""

    models: ServedModels
    settings: ServeSettings
    metrics: Metrics = field(default_factory=Metrics)
    traffic: Traffic = field(default_factory=Traffic)
    ledger: Ledger | None = None  # set when the server starts
    is_draining: bool = False  # it is about to stop: balancers should send elsewhere
    stores: Stores = field(default_factory=Stores)
    names: Names = field(default_factory=Names)
    upstreams: UpstreamModels = field(default_factory=UpstreamModels)  # of foreign servers
    peers: Peers | None = None  # the other workers of this gateway; None: there are none

    async def read(self, request: Request, type: type[R]) -> tuple[R, ServedModel]:
        """Parse the body and find its model. Raises: ApiError."""
        body = await parse(request, type, self.settings.max_body_bytes)
        return body, self.find(body.model)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of that name; without a name, the only one.

        `model@chip` is a view of the replicas on a chip, `batch-model` one at low priority.
        Raises: ApiError 404 for an unknown model or chip, 400 for a chip without this model, 503
        for a model that still loads.
        """
        model = self.names.find(self.models, name) if name else self.models.only()
        if model is None and self.settings.is_lenient:
            model = self.models.only()
        if model is not None:
            note_model(model.name, permitted_name(model))
            return model
        pending = self.models.pending
        plain = base_name(name) if name else next(iter(pending), "")
        if plain in pending and (name or not len(self.models)):
            raise self._loading(plain)
        known = self.known_names()
        if not name:
            raise ApiError(f"model is required; one of {known}.", param="model")
        raise model_not_found(name, known)

    def known_names(self) -> list[str]:
        """Return the names of all models that the caller's key may use."""
        foreign = (model.name for model in self.upstreams)
        return [
            name for name in (*self.models.names(), *self.models.pending, *foreign) if may_see(name)
        ]

    def _loading(self, name: str) -> ApiError:
        pending = self.models.pending[name]
        if pending.failure is not None:
            message = f"Model {name!r} could not be loaded: {pending.failure}"
            return unavailable(message, type="server_error", code="model_failed")
        message = f"Model {name!r} is loading."
        if pending.progress is not None and pending.progress.total:
            share = 100 * pending.progress.done // pending.progress.total
            message = f"Model {name!r} is loading ({pending.progress.stage}, {share} %)."
        return unavailable(message, type="model_loading", code="model_loading")


def note_model(name: str, permitted: str) -> None:
    """Note which model a request is for; `permitted` is what its key's list of models must hold.

    Raises: ForbiddenError when the key may not use it.
    """
    context = current()
    context.model = name
    principal = context.principal
    if principal is not None and not principal.may_use(permitted):
        raise ForbiddenError(f"this key may not use the model {permitted!r}")


def may_see(name: str) -> bool:
    """Whether the caller's key may use a model of that name."""
    principal = current().principal
    return principal is None or principal.may_use(name)


def require_kind(model: ServedModel, *kinds: Kind) -> None:
    """Refuse a model that cannot do what the route is for. Raises: ApiError."""
    if model.info.kind not in kinds:
        raise ApiError(
            f"Model {model.name!r} is a {model.info.kind}; use {_ROUTE_FOR[model.info.kind]}.",
            param="model",
            code="model_kind",
        )


def new_id(prefix: str) -> str:
    """Return an id that is unique across servers."""
    return f"{prefix}-{os.urandom(16).hex()}"


def token_prompts(
    value: str | Sequence[str | int | list[int]], param: str, max_inputs: int
) -> list[str | list[int]]:
    """Split the four input shapes of OpenAI into texts and token id lists, in order.

    Raises: ApiError for an empty or mixed list, or for more than `max_inputs` entries.
    """
    if isinstance(value, str):
        return [value]
    kinds = {type(item) for item in value}
    if kinds == {int}:
        return [list(value)]  # type: ignore[arg-type]
    if kinds not in ({str}, {list}):
        what = "an empty list" if not value else "a mixed list"
        raise ApiError(
            f"{param} is a string, strings, token ids, or lists of token ids; got {what}.",
            param=param,
        )
    if len(value) > max_inputs:
        raise ApiError(
            f"{param} takes at most {max_inputs} entries, got {len(value)}.", param=param
        )
    return list(value)  # type: ignore[arg-type]
