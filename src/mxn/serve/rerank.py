"""POST /rerank (Jina and Cohere shapes) and /score: how well documents answer a query.

The score rule is in `pooling.py`: sigmoid of a reranker's logit, cosine for an embedder.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.http import json_response
from mxn.serve.openai.errors import ApiError, not_supported
from mxn.serve.openai.types import ModelRequest, PromptUsage
from mxn.serve.pooling import score_pairs
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id, require_kind

TokenLimit = Annotated[int, Meta(ge=1)]


class Document(Struct, kw_only=True):
    text: str


class RerankRequest(ModelRequest, kw_only=True):
    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1)]
    top_n: Annotated[int, Meta(ge=0)] | None = None  # 0 or absent: all
    return_documents: bool | None = None
    max_tokens_per_doc: TokenLimit | None = None
    max_tokens_per_query: TokenLimit | None = None
    instruction: str | None = None


class RerankResult(Struct, kw_only=True):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankAnswer(Struct, kw_only=True):
    id: str
    model: str
    usage: PromptUsage
    results: list[RerankResult]


class ScoreRequest(ModelRequest, kw_only=True):
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class Score(Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class RerankRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def rerank(self, request: Request) -> Response:
        body, model = await self._state.read(request, RerankRequest)
        require_kind(model, "reranker", "embedder")
        if body.instruction:
            raise not_supported("instruction", "instruction")
        texts = [item if isinstance(item, str) else item.text for item in body.documents]
        self._check_count(len(texts), "documents")
        pairs = await asyncio.to_thread(_cut_pairs, model, body, texts)
        answer_id = new_id("rerank")
        scores = await score_pairs(request, self._state, model, pairs, "documents", answer_id)
        order = sorted(range(len(texts)), key=lambda index: -scores.values[index])
        shows = body.return_documents is not False
        results = [
            RerankResult(
                index=index,
                relevance_score=scores.values[index],
                document=Document(text=texts[index]) if shows else UNSET,
            )
            for index in order[: body.top_n or None]
        ]
        usage = PromptUsage(prompt_tokens=scores.prompt_tokens, total_tokens=scores.prompt_tokens)
        answer = RerankAnswer(id=answer_id, model=model.name, usage=usage, results=results)
        return json_response(answer, model.headers)

    async def score(self, request: Request) -> Response:
        body, model = await self._state.read(request, ScoreRequest)
        require_kind(model, "reranker", "embedder")
        pairs, param = _pairs(body)
        self._check_count(len(pairs), param)
        answer_id = new_id("score")
        scores = await score_pairs(request, self._state, model, pairs, param, answer_id)
        answer = ScoreAnswer(
            id=answer_id,
            created=int(time.time()),
            model=model.name,
            data=[Score(index=index, score=value) for index, value in enumerate(scores.values)],
            usage=PromptUsage(
                prompt_tokens=scores.prompt_tokens, total_tokens=scores.prompt_tokens
            ),
        )
        return json_response(answer, model.headers)

    def _check_count(self, count: int, param: str) -> None:
        limit = self._state.settings.max_inputs
        if count > limit:
            raise ApiError(f"{param} takes at most {limit} entries, got {count}.", param=param)


def _cut_pairs(model: ServedModel, body: RerankRequest, texts: list[str]) -> list[tuple[str, str]]:
    query = _cut(model, body.query, body.max_tokens_per_query)
    return [(query, _cut(model, text, body.max_tokens_per_doc)) for text in texts]


def _cut(model: ServedModel, text: str, max_tokens: int | None) -> str:
    """Shorten a text, which happens only where the request asks for it."""
    return text if max_tokens is None else model.tokenizer.truncate(text, max_tokens)


def _pairs(body: ScoreRequest) -> tuple[list[tuple[str, str]], str]:
    """Join 1:1, 1:n or n:n texts; return the pairs and the field that errors name."""
    for first, second, names in (
        (body.text_1, body.text_2, ("text_1", "text_2")),
        (body.queries, body.documents, ("queries", "documents")),
    ):
        if first is None or second is None:
            continue
        left = [first] if isinstance(first, str) else first
        right = [second] if isinstance(second, str) else second
        if not left or not right or len(left) not in (1, len(right)):
            raise ApiError(
                f"{names[0]} has {len(left)} and {names[1]} has {len(right)} texts; "
                "both need at least one, and the first one text or as many as the second.",
                param=names[0],
            )
        left = left * len(right) if len(left) == 1 else left
        return list(zip(left, right, strict=True)), names[1]
    raise ApiError("Send text_1 and text_2, or queries and documents.", param="text_1")
