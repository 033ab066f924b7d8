"""POST /tokenize and /detokenize: what a model's tokenizer makes of a text or a chat."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.chat.dialect import dialect_of
from mxn.serve.chat.prompt import render_aside
from mxn.serve.http import json_response
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.prompt_checks import check_ids
from mxn.serve.openai.types import ChatMessage, ChatRequest, ModelRequest, TokenIds
from mxn.serve.served import ServedModel
from mxn.serve.state import State


class TokenizeRequest(ModelRequest, kw_only=True):
    """Either `prompt`, or `messages`, which go through the chat template first."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for a chat
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(ModelRequest, kw_only=True):
    tokens: TokenIds


class DetokenizeAnswer(Struct, kw_only=True):
    prompt: str


def _spell(model: ServedModel, ids: list[int]) -> list[str]:
    return [model.tokenizer.token_text(token_id) for token_id in ids]


class TokenizeRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def tokenize(self, request: Request) -> Response:
        body, model = await self._state.read(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("Send either prompt or messages.", param="prompt")
        text, adds_special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            chat = ChatRequest(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            text = await render_aside(chat, model, dialect_of(model))
            adds_special = bool(body.add_special_tokens)
        ids = await model.encode(text or "", adds_special)
        spelled = await asyncio.to_thread(_spell, model, ids) if body.return_token_strs else None
        answer = TokenizeAnswer(
            count=len(ids),
            max_model_len=model.info.max_context,
            tokens=ids,
            token_strs=spelled,
        )
        return json_response(answer, model.headers)

    async def detokenize(self, request: Request) -> Response:
        body, model = await self._state.read(request, DetokenizeRequest)
        check_ids(body.tokens, model.info, "tokens")
        # In a thread: a body holds millions of tokens, and every stream would wait for them.
        text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, False)
        return json_response(DetokenizeAnswer(prompt=text), model.headers)
