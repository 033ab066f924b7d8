"""Pass-through: chat, completions and embeddings of a model that foreign servers run.

Bodies go out almost as they came in and come back with our id and name. A stream costs one decode
of each event and one send for each read of the socket; an answer of a few milliseconds costs no
task and no timer that fires. Start at `UpstreamModel`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.ledger.types import Ledger
from mxn.serve.context import RequestContext, current
from mxn.serve.replicas.chat_run import UpstreamChatRun
from mxn.serve.replicas.pass_stream import (
    PassStream,
    Watch,
    WholeAnswer,
    headers_of,
    settle_failed,
    usage_of,
)
from mxn.serve.replicas.sse import Renamer
from mxn.serve.replicas.upstream import Upstream, UpstreamConfig, UpstreamSet
from mxn.serve.replicas.upstream_plan import Account, Plan
from mxn.serve.replicas.upstream_run import UpstreamRun


class UpstreamModel:
    """A model by name, and the servers that run it."""

    def __init__(
        self,
        name: str,
        upstreams: Sequence[UpstreamConfig],
        *,
        aliases: Sequence[str] = (),
        heartbeat_s: float = 15.0,
    ) -> None:
        self.name = name
        self.aliases = tuple(aliases)
        self.created = int(time.time())
        self.heartbeat_s = heartbeat_s
        self.upstreams = UpstreamSet([Upstream(config) for config in upstreams])
        chips = dict.fromkeys(item.config.chip for item in self.upstreams.all if item.config.chip)
        self.chips = tuple(chips)
        self._name_json = msgspec.Raw(msgspec.json.encode(name))

    @property
    def is_healthy(self) -> bool:
        return self.upstreams.is_healthy

    async def close(self) -> None:
        await self.upstreams.close()

    async def chat(self, request: Request, body: bytes, ledger: Ledger | None = None) -> Response:
        """Answer a body of /v1/chat/completions. Raises: ApiError, MxnError, ClientGone."""
        return await self._answer(request, body, "/v1/chat/completions", "chatcmpl-", ledger)

    async def completions(
        self, request: Request, body: bytes, ledger: Ledger | None = None
    ) -> Response:
        """Answer a body of /v1/completions. Raises: like `chat`."""
        return await self._answer(request, body, "/v1/completions", "cmpl-", ledger)

    async def embeddings(
        self, request: Request, body: bytes, ledger: Ledger | None = None
    ) -> Response:
        """Answer a body of /v1/embeddings. Raises: like `chat`."""
        return await self._answer(request, body, "/v1/embeddings", "embd-", ledger)

    async def run(
        self, body: bytes, ledger: Ledger | None = None, *, prefix: str = "chatcmpl-"
    ) -> UpstreamChatRun:
        """Return a `ChatRun` of a chat body, for protocols that write events of their own."""
        plan = self._plan(body, "/v1/chat/completions", prefix, current())
        plan.head.stream = True
        plan.fields["stream"] = msgspec.Raw(b"true")
        return UpstreamChatRun(self._run(plan, ledger), self.name)

    def _plan(self, body: bytes, path: str, prefix: str, context: RequestContext) -> Plan:
        name = prefix + os.urandom(16).hex()
        return Plan.read(body, id=name, model=self.name, path=path, context=context)

    def _run(self, plan: Plan, ledger: Ledger | None) -> UpstreamRun:
        account = Account(ledger, self.chips, self.upstreams.max_output)
        return UpstreamRun(plan, self.upstreams, account)

    async def _answer(
        self, request: Request, body: bytes, path: str, prefix: str, ledger: Ledger | None
    ) -> Response:
        plan = self._plan(body, path, prefix, current())
        run = self._run(plan, ledger)
        await run.begin()
        if plan.is_streamed:
            return PassStream(run, Renamer(plan.id, self.name), self.heartbeat_s)
        try:
            async with Watch(request.receive, run):
                fields = await run.whole()
        except BaseException as exc:
            await settle_failed(run, exc)
            raise
        return await self._whole(run, fields)

    async def _whole(self, run: UpstreamRun, fields: dict[str, msgspec.Raw]) -> Response:
        plan = run.plan
        if "id" in fields:
            fields["id"] = msgspec.Raw(msgspec.json.encode(plan.id))
        fields["model"] = self._name_json
        if "usage" in fields and run.counts().basis != "server":
            fields["usage"] = msgspec.Raw(msgspec.json.encode(usage_of(run.counts())))
        await run.settle("complete")
        return WholeAnswer(msgspec.json.encode(fields), headers_of(plan))
