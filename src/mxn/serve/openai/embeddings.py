"""POST /v1/embeddings: texts or token ids in, float lists or base64 float32 out."""

from __future__ import annotations

import base64

from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.http import json_response
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import EmbeddingList, EmbeddingRequest, EmbeddingRow, PromptUsage
from mxn.serve.pooling import encode, normalized, tokenize_inputs, vector
from mxn.serve.state import State, require_kind, token_prompts


class EmbeddingRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def create(self, request: Request) -> Response:
        body, model = await self._state.read(request, EmbeddingRequest)
        require_kind(model, "embedder")
        inputs = token_prompts(body.input, "input", self._state.settings.max_inputs)
        sequences = await tokenize_inputs(model, inputs, "input")
        encoded = await encode(request, self._state, model, sequences)
        rows = [_shorten(row, body.dimensions) for row in encoded.rows]
        answer = EmbeddingList(
            data=[
                EmbeddingRow(index=index, embedding=_encode(row, body.encoding_format))
                for index, row in enumerate(rows)
            ],
            model=model.name,
            usage=PromptUsage(
                prompt_tokens=encoded.prompt_tokens, total_tokens=encoded.prompt_tokens
            ),
        )
        return json_response(answer, model.headers)


def _shorten(row: bytes, dimensions: int | None) -> bytes:
    """Keep the first `dimensions` values and normalize again. Raises: ApiError 400."""
    if dimensions is None:
        return row
    values = vector(row)
    if dimensions > len(values):
        raise ApiError(
            f"dimensions {dimensions} is above this model's {len(values)}.", param="dimensions"
        )
    return row if dimensions == len(values) else normalized(values[:dimensions]).tobytes()


def _encode(row: bytes, encoding: str | None) -> list[float] | str:
    """Both forms decode to the same bits: a float32 survives the way through JSON's doubles."""
    if encoding == "base64":
        return base64.b64encode(row).decode("ascii")
    return vector(row).tolist()
