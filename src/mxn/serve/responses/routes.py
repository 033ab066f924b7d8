"""/v1/responses: create (whole, streamed, in the background), read, delete, cancel, count."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from mxn.engine.protocol import TokenLogprob
from mxn.serve.batch.routes import page_limit, path_id, requester, without_nul
from mxn.serve.chat.anywhere import start_anywhere
from mxn.serve.chat.events import ChatRun
from mxn.serve.chat.run import count_prompt_tokens
from mxn.serve.http import json_response, parse, unless_gone
from mxn.serve.openai.errors import ApiError, from_exception
from mxn.serve.openai.logprobs import chat_logprobs
from mxn.serve.openai.stream import EventStream
from mxn.serve.openapi import Operation
from mxn.serve.responses.answer import Builder
from mxn.serve.responses.convert import items_of, items_of_output, to_chat
from mxn.serve.responses.store import ResponseStore, Stored, chain
from mxn.serve.responses.types import (
    Deleted,
    InputItem,
    InputTokens,
    InputTokensRequest,
    ItemList,
    Response,
    ResponseRequest,
    TextOptions,
)
from mxn.serve.served import ServedModel
from mxn.serve.state import State

log = logging.getLogger("mxn.serve.responses")


class ResponseRoutes:
    def __init__(self, state: State, store: ResponseStore) -> None:
        self._state = state
        self._store = store
        self._background = state.stores.background

    async def create(self, request: Request) -> HttpResponse:
        body = await parse(request, ResponseRequest, self._state.settings.max_body_bytes)
        if body.background and body.stream:
            raise ApiError("A response in the background is not streamed.", param="stream")
        project = requester().project_id
        if body.background:
            start = partial(self._start, body)
            queued = await self._background.begin(project, items_of(body), start)
            return HttpResponse(queued, media_type="application/json")
        run, builder = await self._start(body)
        if not body.stream:
            await unless_gone(request, self._whole(run, builder))
            await self._keep(body, builder.response, project)
            return json_response(builder.response)
        return EventStream(
            self._events(body, run, builder, project),
            headers={},
            heartbeat_s=self._state.settings.heartbeat_s,
            done=b"",
        )

    async def _start(self, body: ResponseRequest) -> tuple[ChatRun, Builder]:
        """Check a request and return its run, and what grows to its answer. Raises: ApiError."""
        earlier = await self._earlier(body)
        chat = to_chat(body, [*earlier, *items_of(body)])
        run = await start_anywhere(self._state, chat, prefix="resp_")
        own = self._state.models.get(body.model or "")
        return run, Builder(_response(body, run), _logprobs(own) if own and chat.logprobs else None)

    async def retrieve(self, request: Request) -> HttpResponse:
        return json_response((await self._find(request)).response)

    async def delete(self, request: Request) -> HttpResponse:
        response_id = path_id(request, "response_id", "response")
        project = requester().project_id
        self._background.drop(project, response_id)
        if not await asyncio.to_thread(self._store.delete, response_id, project):
            raise _not_found(response_id)
        return json_response(Deleted(id=response_id))

    async def cancel(self, request: Request) -> HttpResponse:
        stored = await self._find(request)
        if not stored.response.background:
            raise ApiError("Only a response in the background can be cancelled.", param="id")
        await self._background.cancel(requester().project_id, stored.response.id)
        return json_response((await self._find(request)).response)

    async def input_items(self, request: Request) -> HttpResponse:
        stored = await self._find(request)
        limit = page_limit(request, 20, largest=100)
        items = [_shown(item, at) for at, item in enumerate(stored.input)]
        if request.query_params.get("order", "desc") == "desc":
            items.reverse()
        after = request.query_params.get("after")
        if after is not None:
            ids = [item["id"] for item in items]
            items = items[ids.index(after) + 1 :] if after in ids else []
        page = items[:limit]
        return json_response(
            ItemList(
                data=page,
                first_id=page[0]["id"] if page else None,
                last_id=page[-1]["id"] if page else None,
                has_more=len(items) > limit,
            )
        )

    async def input_tokens(self, request: Request) -> HttpResponse:
        body = await parse(request, InputTokensRequest, self._state.settings.max_body_bytes)
        model = self._state.find(body.model)
        chat = to_chat(body, [*await self._earlier(body), *items_of(body)])
        count = await count_prompt_tokens(self._state, chat, model)
        return json_response(InputTokens(input_tokens=count))

    async def _earlier(self, body: InputTokensRequest) -> list[InputItem]:
        """Return the items of the conversation so far. Raises: ApiError 404."""
        if body.previous_response_id is None:
            return []
        without_nul(body.previous_response_id, "previous_response_id")
        found = await asyncio.to_thread(
            chain, self._store, body.previous_response_id, requester().project_id
        )
        if found is None:
            error = _not_found(body.previous_response_id)
            error.param, error.code = "previous_response_id", "previous_response_not_found"
            raise error
        return [
            item
            for stored in found
            for item in (*stored.input, *items_of_output(stored.response.output))
        ]

    async def _whole(self, run: ChatRun, builder: Builder) -> None:
        builder.begin()
        async with aclosing(run.events()) as events:
            async for event in events:
                builder.add(event)
        builder.end(run.usage())

    async def _events(
        self, body: ResponseRequest, run: ChatRun, builder: Builder, project: str
    ) -> AsyncGenerator[bytes, None]:
        has_begun = False
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    said = [] if has_begun else builder.begin()
                    has_begun = True
                    yield builder.encode([*said, *builder.add(event)])
        except Exception as exc:
            if not has_begun:
                raise  # still gets a real status
            error = from_exception(exc)
            said = builder.fail(error.code or "server_error", error.message, run.usage())
            await self._keep(body, builder.response, project)
            yield builder.encode(said)
            return
        said = builder.end(run.usage())
        await self._keep(body, builder.response, project)
        yield builder.encode(said)

    async def _keep(self, body: ResponseRequest, response: Response, project: str) -> None:
        if body.store is False:
            return
        stored = Stored(response=response, input=items_of(body))
        try:
            await asyncio.to_thread(self._store.put, project, stored)
        except SQLAlchemyError:  # it is made and paid: whoever waits gets it, but nobody later
            log.exception("the answer %s is delivered without being stored", response.id)
            response.store = False

    async def _find(self, request: Request) -> Stored:
        response_id = path_id(request, "response_id", "response")
        project = requester().project_id
        stored = await asyncio.to_thread(self._store.get, response_id, project)
        if stored is None:
            raise _not_found(response_id)
        return stored


def _response(body: ResponseRequest, run: ChatRun) -> Response:
    """Return the response before its first event: what was asked, said back."""
    response = Response(
        id=run.id,
        created_at=float(run.created or int(time.time())),
        status="queued",
        model=run.model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        service_tier=body.service_tier,
        store=body.store is not False,
        background=bool(body.background),
        temperature=body.temperature,
        tool_choice=body.tool_choice if body.tool_choice is not None else "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
    if body.reasoning is not None:
        response.reasoning = body.reasoning
    if body.text is not None:
        response.text = TextOptions(
            format=body.text.format or {"type": "text"}, verbosity=body.text.verbosity
        )
    return response


def _logprobs(model: ServedModel) -> Any:
    def convert(entries: list[TokenLogprob]) -> list[dict[str, Any]]:
        return msgspec.to_builtins(chat_logprobs(model.tokenizer, entries).content)

    return convert


def _shown(item: InputItem, position: int) -> dict[str, Any]:
    """Return an input item as it is listed: with a type, an id and parts for content."""
    shown = msgspec.to_builtins(item)
    shown.setdefault("type", "message")
    shown.setdefault("id", f"{shown['type']}_{position}")
    if shown["type"] == "message":
        shown.setdefault("status", "completed")
        if isinstance(shown.get("content"), str):
            shown["content"] = [{"type": "input_text", "text": shown["content"]}]
    return shown


def _not_found(response_id: str) -> ApiError:
    return ApiError(f"No such response: {response_id!r}.", status=404, param="id", code="not_found")


def response_operations(state: State, store: ResponseStore) -> list[Operation]:
    routes = ResponseRoutes(state, store)
    one = "/v1/responses/{response_id}"
    return [
        Operation(
            method="POST",
            path="/v1/responses",
            handler=routes.create,
            summary="Answer, with items and named events",
            request=ResponseRequest,
            response=Response,
        ),
        Operation(
            method="POST",
            path="/v1/responses/input_tokens",
            handler=routes.input_tokens,
            summary="Tokens that an input has",
            request=InputTokensRequest,
            response=InputTokens,
        ),
        Operation(
            method="GET", path=one, handler=routes.retrieve, summary="A stored answer",
            response=Response,
        ),
        Operation(
            method="DELETE", path=one, handler=routes.delete, summary="Forget a stored answer",
            response=Deleted,
        ),
        Operation(
            method="POST",
            path=f"{one}/cancel",
            handler=routes.cancel,
            summary="Stop an answer that is made in the background",
            response=Response,
        ),
        Operation(
            method="GET",
            path=f"{one}/input_items",
            handler=routes.input_items,
            summary="What a stored answer was an answer to",
            response=ItemList,
        ),
    ]  # fmt: skip
