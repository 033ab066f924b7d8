"""Foreign servers that answer as a script says, and gateways in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from mxn.ledger import schema
from mxn.ledger.database import Database
from mxn.ledger.types import OpenUsage, Principal, Receipt, Settlement, Ticket
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.context import RequestContext, current, enter
from mxn.serve.replicas.http_client import HttpLimits
from mxn.serve.replicas.upstream import UpstreamConfig
from mxn.serve.replicas.upstream_chat import UpstreamModel
from mxn.serve.served import ServedModels
from mxn.serve.server import running
from support.ledgers import Tenant, make_tenant

WORDS = ["Grüße", " 世界", " 🙂", " end"]
USAGE = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
Script = Callable[[dict[str, Any]], list[bytes | float]]


def chunk(delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
    base = {"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "up"}
    return b"data: " + json.dumps(base | {"choices": choices} | more).encode() + b"\n\n"


def stream_of(words: list[str], *, has_usage: bool = True, has_end: bool = True) -> bytes:
    events = [chunk({"role": "assistant", "content": ""})]
    events += [chunk({"content": word}) for word in words]
    if has_end:
        events.append(chunk({}, "stop"))
        events += [chunk(None, usage=USAGE)] if has_usage else []
        events.append(b"data: [DONE]\n\n")
    return b"".join(events)


def whole(body: bytes, status: int = 200, more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (status, more, len(body)) + body


def sse(body: bytes) -> bytes:
    """Return an answer without a length: it ends when the connection does."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body


class Fake:
    """A server that answers as a script says: bytes are sent, numbers are pauses in seconds, and
    the connection is closed at the end (`ABORT`: reset)."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.num_gone = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            self.bodies.append(body)
            gone = asyncio.ensure_future(reader.read(1))
            for step in self.script(body):
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.wait({gone}, timeout=step)
                    self.num_gone += reader.at_eof()
            gone.cancel()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the gateway has left, which is what some tests are about
        finally:
            writer.close()


@contextlib.contextmanager
def fakes(*scripts: Script) -> Iterator[list[Fake]]:
    """Run fake servers in a thread."""
    found = [Fake(script) for script in scripts]
    is_up = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> None:
        for fake in found:
            server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
            fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        is_up.set()

    def work() -> None:
        starting = loop.create_task(start())
        loop.run_forever()
        starting.result()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert is_up.wait(5)
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


class Book:
    """A ledger in memory that keeps the rules of the real one: open once, settle once."""

    def __init__(self) -> None:
        self.opened: dict[str, OpenUsage] = {}
        self.settled: dict[str, Settlement] = {}

    async def authenticate(self, key: str) -> Principal:
        return Principal(key_id="k", org_id="o", project_id="p")

    async def open(self, usage: OpenUsage) -> Ticket:
        assert usage.usage_id not in self.opened
        self.opened[usage.usage_id] = usage
        return Ticket(usage=usage, opened_us=0)

    def progress(
        self,
        ticket: Ticket,
        input_tokens: int,
        output_tokens: int,
        *,
        chip: str = "",
        replica: str = "",
    ) -> None: ...

    async def settle(self, ticket: Ticket, settlement: Settlement) -> Receipt:
        await asyncio.sleep(0.005)
        assert ticket.usage.usage_id not in self.settled
        self.settled[ticket.usage.usage_id] = settlement
        return Receipt(usage_id=ticket.usage.usage_id, cost_micro=0, currency="CNY")

    async def close(self) -> None: ...

    def only(self) -> Settlement:
        assert len(self.opened) == len(self.settled) == 1
        return next(iter(self.settled.values()))


class _Model(UpstreamModel):
    """As behind a gateway that knows who asks, with a ledger."""

    book: Book

    async def _answer(self, request: Any, body: bytes, path: str, prefix: str, ledger: Any) -> Any:
        context = RequestContext(principal=await self.book.authenticate(""))
        enter(context)
        assert current() is context
        return await super()._answer(request, body, path, prefix, self.book)


@contextlib.contextmanager
def gateway(
    *configs: UpstreamConfig | Fake, heartbeat_s: float = 15.0
) -> Iterator[tuple[httpx.Client, Book]]:
    found = [
        UpstreamConfig(
            url=item.url, model="up", kind="vllm", chip="c1", limits=HttpLimits(silence_s=1.0)
        )
        if isinstance(item, Fake)
        else item
        for item in configs
    ]
    app = create_app(ServedModels())
    model = _Model("m", found, heartbeat_s=heartbeat_s)
    model.book = Book()
    app.state.mxn.upstreams.add(model)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client, model.book


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "odd_field": [1, None]}
    return client.post("/v1/chat/completions", json=body | more)


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )


COMPLETION = json.dumps(
    {
        "id": "up-1",
        "model": "up",
        "odd": {"id": "up-1"},
        "choices": [{"index": 0, "message": {"content": "hey"}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
).encode()


def lost_after(*events: bytes) -> Script:
    """Return a server that is lost in mid-answer: fewer bytes come than it had said."""
    body = b"".join(events)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
    return lambda _: [head % (len(body) + 99) + body]


class Billed:
    """A gateway with a real ledger: what it answers, and the rows it wrote."""

    def __init__(self, client: httpx.Client, tenant: Tenant) -> None:
        self.client = client
        self.tenant = tenant

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "m"} | body)

    def chat(self, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return self.post("/v1/chat/completions", messages=messages, **more)

    def rows(self) -> list[Any]:
        with self.tenant.database.read() as connection:
            return list(connection.execute(select(schema.usage).order_by(schema.usage.c.opened_us)))

    def row(self) -> Any:
        """Return the only row, which must be settled."""
        for _ in range(100):
            if [row.state for row in self.rows()] == ["settled"]:
                return self.rows()[0]
            threading.Event().wait(0.02)
        raise AssertionError(self.rows())


@contextlib.contextmanager
def billed(
    folder: Path, *servers: Fake, budget: int | None = None, **options: Any
) -> Iterator[Billed]:
    """Serve model `m` of these servers to a tenant whose tokens cost one micro each.

    `budget`: of this many micros. `options`: of each server.
    """
    database = Database.open(f"sqlite:///{folder}/ledger.db")
    tenant = make_tenant(database)
    tenant.price("input", 1_000_000)
    tenant.price("output", 1_000_000)
    if budget is not None:
        tenant.budget(budget, currency="USD")
    app = create_app(ServedModels(), accounting=Accounting(Database(str(database.url))))
    configs = [
        UpstreamConfig(url=item.url, model="up", kind="vllm", chip="c1", **options)
        for item in servers
    ]
    app.state.mxn.upstreams.add(UpstreamModel("m", configs))
    key = {"authorization": f"Bearer {tenant.key}"}
    with running(app) as url, httpx.Client(base_url=url, headers=key, timeout=20) as client:
        yield Billed(client, tenant)
    database.close()
