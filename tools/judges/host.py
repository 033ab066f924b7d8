"""Serves mxn to other projects' test suites: real engine processes, one HTTP server per request.

Loads each model once, then listens on a unix socket. A client sends one JSON line that says what to
serve (`Wanted`), gets one JSON line back, and keeps the connection open for as long as the server
shall live. So a suite that starts a server for every test does not load a model for every test.
Knows no suite; the only thing it adds to mxn is `adapter.py`, on request.

python tools/judges/host.py --socket PATH --model decoder=DIR --model embedder=DIR
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from adapter import LlamaServerPaths
from starlette.types import ASGIApp

from mxn.engine.client import ProcessEngine
from mxn.engine.config import EngineConfig
from mxn.engine.echo import EchoEngine
from mxn.engine.protocol import Delta, Encode, Encoded, EngineStats, Generate, ModelInfo
from mxn.errors import ConfigError
from mxn.ledger.database import Database
from mxn.models.chat_template import ChatTemplates
from mxn.models.tokenizer import Tokenizer
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.served import GenerationDefaults, ServedModel, ServedModels
from mxn.serve.server import Server, bind, url_of
from mxn.serve.settings import ServeSettings


class Wanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server. `models` are keys of --model, or `echo`; with one, any model name is taken."""

    models: list[str]
    port: int = 0
    name: str | None = None  # of the only model
    is_lenient: bool = True
    api_keys: list[str] = []
    max_context: int | None = None
    chat_template: str | None = None  # Jinja text in place of the model's own
    template_kwargs: dict[str, Any] = {}  # what /apply-template gives to it
    database: str | None = None
    llama_paths: bool = False


class Kept:
    """An engine whose server may go while the engine stays; a context may be declared smaller."""

    def __init__(self, engine: Any, max_context: int | None) -> None:
        self._engine = engine
        limit = engine.info.max_context
        self.info: ModelInfo = msgspec.structs.replace(
            engine.info, max_context=min(max_context or limit, limit)
        )

    @property
    def is_healthy(self) -> bool:
        return self._engine.is_healthy

    def generate(self, request: Generate) -> AsyncIterator[Delta]:
        return self._engine.generate(request)

    async def encode(self, request: Encode) -> Encoded:
        return await self._engine.encode(request)

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def close(self) -> None:
        """The host closes it."""


class QuietServer(Server):
    """One of several in this process: signals are the host's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Host:
    def __init__(self) -> None:
        self._engines: dict[str, ProcessEngine] = {}
        self._folders: dict[str, Path] = {}

    async def load(self, key: str, folder: Path) -> None:
        self._engines[key] = await ProcessEngine.start(EngineConfig(model=str(folder)))
        self._folders[key] = folder

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.close()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve what one client wants until it closes the connection."""
        server: QuietServer | None = None
        task: asyncio.Task[None] | None = None
        try:
            wanted = msgspec.json.decode(await reader.readline(), type=Wanted)
            app = self._app(wanted)
            sock = bind("127.0.0.1", wanted.port)
            is_up = asyncio.Event()
            server = QuietServer(app, drain_s=1.0, on_listening=lambda _: is_up.set())
            task = asyncio.create_task(server.serve(sockets=[sock]))
            await asyncio.wait_for(is_up.wait(), 30)
            await _say(writer, {"url": url_of(sock)})
            await reader.read()
        except Exception as exc:
            print(f"host: {exc!r}", file=sys.stderr, flush=True)
            await _say(writer, {"error": repr(exc)})
        finally:
            if server is not None and task is not None:
                server.should_exit = True
                await task
            writer.close()

    def _app(self, wanted: Wanted) -> ASGIApp:
        models = ServedModels()
        for key in wanted.models:
            models.add(self._served(key, wanted))
        settings = ServeSettings(is_lenient=wanted.is_lenient, api_keys=tuple(wanted.api_keys))
        accounting = Accounting(Database.open(wanted.database)) if wanted.database else None
        app = create_app(models, settings, accounting=accounting)
        if not wanted.llama_paths:
            return app
        return LlamaServerPaths(app, models, wanted.template_kwargs)

    def _served(self, key: str, wanted: Wanted) -> ServedModel:
        name = wanted.name or key
        if key.startswith("echo"):
            kinds = {"echo": "decoder", "echo-embedder": "embedder", "echo-reranker": "reranker"}
            echo = EchoEngine(kind=kinds[key])  # type: ignore[arg-type]
            return ServedModel(name=name, client=Kept(echo, None), tokenizer=echo.tokenizer)
        if key not in self._engines:
            raise ConfigError(f"no --model {key}=DIR was given; there are {list(self._engines)}")
        tokenizer = Tokenizer.load(self._folders[key])
        if wanted.chat_template is not None:
            config = {"chat_template": wanted.chat_template}
            tokenizer.templates = ChatTemplates.load(Path("/nonexistent"), config)
        return ServedModel(
            name=name,
            client=Kept(self._engines[key], wanted.max_context),
            tokenizer=tokenizer,
            defaults=GenerationDefaults.load(self._folders[key]),
        )


async def _say(writer: asyncio.StreamWriter, what: dict[str, str]) -> None:
    writer.write(json.dumps(what).encode() + b"\n")
    await writer.drain()


async def main(path: Path, models: dict[str, Path]) -> None:
    host = Host()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        for key, folder in models.items():
            await host.load(key, folder)
        listener = await asyncio.start_unix_server(host.talk, path)
        await stopping.wait()
        listener.close()
    finally:
        await host.close()


def _pair(text: str) -> tuple[str, Path]:
    key, _, folder = text.partition("=")
    return key, Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--model", type=_pair, action="append", default=[])
    arguments = parser.parse_args()
    asyncio.run(main(arguments.socket, dict(arguments.model)))
