"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes also for errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from mxn.serve.anthropic.answer import PING, Collector, EventWriter
from mxn.serve.anthropic.convert import to_chat
from mxn.serve.anthropic.errors import event_of
from mxn.serve.anthropic.types import (
    CountTokensAnswer,
    CountTokensRequest,
    Message,
    MessagesRequest,
)
from mxn.serve.chat.anywhere import start_anywhere
from mxn.serve.chat.events import ChatRun
from mxn.serve.chat.run import count_prompt_tokens
from mxn.serve.context import current
from mxn.serve.http import json_response, parse, unless_gone
from mxn.serve.openai.stream import EventStream
from mxn.serve.openapi import Operation
from mxn.serve.state import State


class MessageRoutes:
    def __init__(self, state: State) -> None:
        self._state = state

    async def create(self, request: Request) -> Response:
        _name_request()
        body = await parse(request, MessagesRequest, self._state.settings.max_body_bytes)
        run = await start_anywhere(self._state, to_chat(body), prefix="msg_")
        if not body.stream:
            return json_response(await unless_gone(request, _whole(run)))
        return EventStream(
            _events(run),
            headers={},
            heartbeat_s=self._state.settings.heartbeat_s,
            done=b"",
            ping=PING,
            error_event=event_of,
        )

    async def count_tokens(self, request: Request) -> Response:
        _name_request()
        body = await parse(request, CountTokensRequest, self._state.settings.max_body_bytes)
        model = self._state.find(body.model)
        count = await count_prompt_tokens(self._state, to_chat(body), model)
        return json_response(CountTokensAnswer(input_tokens=count))


def _name_request() -> None:
    """Anthropic's clients read the request's id from a header of another name."""
    context = current()
    context.headers["request-id"] = context.request_id


async def _whole(run: ChatRun) -> Message:
    collector = Collector()
    async with aclosing(run.events()) as events:
        async for event in events:
            collector.add(event)
    return collector.message(run.id, run.model, run.usage())


async def _events(run: ChatRun) -> AsyncGenerator[bytes, None]:
    writer = EventWriter(run.id, run.model)
    has_begun = False
    async with aclosing(run.events()) as events:
        async for event in events:
            start = b"" if has_begun else writer.start(run.usage())
            has_begun = True
            data = start + writer.write(event, run.usage())
            if data:
                yield data


def message_operations(state: State) -> list[Operation]:
    routes = MessageRoutes(state)
    return [
        Operation(
            method="POST",
            path="/v1/messages",
            handler=routes.create,
            summary="Answer a conversation, in Anthropic's words",
            request=MessagesRequest,
            response=Message,
        ),
        Operation(
            method="POST",
            path="/v1/messages/count_tokens",
            handler=routes.count_tokens,
            summary="Tokens that a conversation would be billed for",
            request=CountTokensRequest,
            response=CountTokensAnswer,
        ),
    ]
