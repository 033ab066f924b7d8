"""The table of all routes: path, handler and types. A new protocol adds its rows here."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.adapters import adapter_operations
from mxn.serve.anthropic.routes import message_operations
from mxn.serve.batch.routes import batch_operations
from mxn.serve.http import json_response
from mxn.serve.maas import maas_operations
from mxn.serve.openai.chat import ChatRoutes
from mxn.serve.openai.completions import CompletionRoutes
from mxn.serve.openai.embeddings import EmbeddingRoutes
from mxn.serve.openai.models import ModelRoutes
from mxn.serve.openai.types import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    ModelCard,
    ModelList,
)
from mxn.serve.openapi import Operation, document
from mxn.serve.replicas.passthrough import PassThrough
from mxn.serve.replicas.server import replica_operations
from mxn.serve.rerank import RerankAnswer, RerankRequest, RerankRoutes, ScoreAnswer, ScoreRequest
from mxn.serve.responses.routes import response_operations
from mxn.serve.state import State
from mxn.serve.status import StatusRoutes
from mxn.serve.tokenize import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizeRoutes,
)


def operations(state: State) -> list[Operation]:
    """Return every route of the server, `/openapi.json` last."""
    table = [
        *_openai(state),
        *_scoring(state),
        *_tokens(state),
        *_status(state),
        *adapter_operations(state),
        *replica_operations(state),
        *message_operations(state),
        *response_operations(state, state.stores.responses),
        *batch_operations(state, state.stores.files, state.stores.batches, state.stores.worker),
    ]
    table += maas_operations(state, table)
    described = document(table)

    async def openapi(request: Request) -> Response:
        return json_response(described)

    table.append(
        Operation(method="GET", path="/openapi.json", handler=openapi, summary="This document")
    )
    return table


def _openai(state: State) -> list[Operation]:
    models = ModelRoutes(state)
    foreign = PassThrough(
        state.upstreams,
        state.settings.max_body_bytes,
        lambda: getattr(state, "ledger", None),
    )
    return [
        Operation(
            method="GET",
            path="/v1/models",
            handler=models.list,
            summary="Models that are served",
            response=ModelList,
        ),
        Operation(
            method="GET",
            path="/v1/models/{model:path}",
            handler=models.retrieve,
            summary="One model",
            response=ModelCard,
        ),
        Operation(
            method="POST",
            path="/v1/chat/completions",
            handler=foreign.around("chat", ChatRoutes(state).create),
            summary="Answer a conversation",
            request=ChatRequest,
            response=ChatCompletion,
            chunk=ChatChunk,
        ),
        Operation(
            method="POST",
            path="/v1/completions",
            handler=foreign.around("completions", CompletionRoutes(state).create),
            summary="Continue a text",
            request=CompletionRequest,
            response=Completion,
            chunk=Completion,
        ),
        Operation(
            method="POST",
            path="/v1/embeddings",
            handler=foreign.around("embeddings", EmbeddingRoutes(state).create),
            summary="Vectors of texts",
            request=EmbeddingRequest,
            response=EmbeddingList,
        ),
    ]


def _scoring(state: State) -> list[Operation]:
    routes = RerankRoutes(state)
    rerank = [
        Operation(
            method="POST",
            path=path,
            handler=routes.rerank,
            summary="Sort documents by relevance to a query",
            request=RerankRequest,
            response=RerankAnswer,
        )
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ]
    score = [
        Operation(
            method="POST",
            path=path,
            handler=routes.score,
            summary="Scores of pairs of texts",
            request=ScoreRequest,
            response=ScoreAnswer,
        )
        for path in ("/score", "/v1/score")
    ]
    return [*rerank, *score]


def _tokens(state: State) -> list[Operation]:
    routes = TokenizeRoutes(state)
    return [
        Operation(
            method="POST",
            path="/tokenize",
            handler=routes.tokenize,
            summary="Token ids of a text or a chat",
            request=TokenizeRequest,
            response=TokenizeAnswer,
        ),
        Operation(
            method="POST",
            path="/detokenize",
            handler=routes.detokenize,
            summary="Text of token ids",
            request=DetokenizeRequest,
            response=DetokenizeAnswer,
        ),
    ]


def _status(state: State) -> list[Operation]:
    status = StatusRoutes(state)
    return [
        Operation(
            method="GET", path="/health", handler=status.health, summary="503 until all is ready"
        ),
        Operation(method="GET", path="/ping", handler=status.health, summary="The same"),
        Operation(method="GET", path="/load", handler=status.load, summary="Requests under way"),
        Operation(
            method="GET",
            path="/metrics",
            handler=status.metrics,
            summary="Prometheus metrics",
            media_type="text/plain",
        ),
        Operation(method="GET", path="/version", handler=status.version, summary="mxn's version"),
    ]
