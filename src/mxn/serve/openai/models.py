"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.http import json_response
from mxn.serve.names import chips_of
from mxn.serve.openai.errors import model_not_found
from mxn.serve.openai.types import ModelCard, ModelList
from mxn.serve.replicas.upstream_chat import UpstreamModel
from mxn.serve.served import ServedModel
from mxn.serve.state import State, may_see


class ModelRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def list(self, request: Request) -> Response:
        cards = [
            _card(model, name)
            for model in self._state.models.all()
            if may_see(model.name)
            for name in (model.name, *model.aliases)
        ]
        cards += [
            _foreign_card(model, name)
            for model in self._state.upstreams
            if may_see(model.name)
            for name in (model.name, *model.aliases)
        ]
        return json_response(ModelList(data=cards))

    async def retrieve(self, request: Request) -> Response:
        name = request.path_params["model"]
        foreign = self._state.upstreams.get(name)
        if foreign is not None and may_see(foreign.name):
            return json_response(_foreign_card(foreign, name))
        model = self._state.models.get(name)
        if model is None and self._state.settings.is_lenient:
            model = self._state.models.only()
        if model is None or not may_see(model.name):
            raise model_not_found(name, self._state.known_names())
        return json_response(_card(model, name))


def _card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        parent=model.parent,
        kind=model.info.kind,
        family=model.info.family,
        device=model.info.device,
        chips=chips_of(model),
        max_model_len=model.info.max_context,
    )


def _foreign_card(model: UpstreamModel, name: str) -> ModelCard:
    """Return what is known without asking a server: its kind, and the chips it was said to have."""
    servers = model.upstreams.all
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        kind="foreign",
        family=",".join(dict.fromkeys(server.config.kind for server in servers)),
        device="",
        chips=list(dict.fromkeys(s.config.chip for s in servers if s.config.chip)),
        max_model_len=None,
    )
