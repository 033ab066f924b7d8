"""`mxn chat`: talk to a model, on a running server or on a replica of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from typing import Annotated, Any

import typer

from mxn.cli.options import Device, Dtype, Threads
from mxn.errors import NotFoundError, UserError


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="A model to load; none: talk to the server that runs on this machine."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Address of a server, such as http://127.0.0.1:8000.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name on the server.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MXN_API_KEY", help="Key for the server; by default `mxn up`'s, on this machine."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 0,
) -> None:
    """Chat in the terminal. /clear forgets the conversation, /exit or Ctrl-D ends it."""
    messages = [{"role": "system", "content": system}] if system else []
    options = {"temperature": temperature, "max_tokens": max_tokens}
    source: _Remote | _Local
    if model is None:
        source = _Remote(url, name, api_key, options)
    else:
        from mxn.cli.replica import config_for

        source = _Local(config_for(model, device=device, dtype=dtype, threads=threads), options)
    try:
        asyncio.run(_chat(source, messages))
    except KeyboardInterrupt:
        # Everything is closed by now but the thread that reads a line, and nothing can end that.
        sys.stdout.flush()
        os._exit(130)


class _Local:
    """Answers from a replica of this process."""

    def __init__(self, config: Any, options: dict[str, Any]) -> None:
        self._config, self._options = config, options

    async def open(self) -> str:
        from mxn.cli.replica import start_replica

        self._replica = await start_replica(self._config)
        return self._config.model

    async def answer(self, messages: list[dict[str, str]]) -> Any:
        from mxn.engine.protocol import Generate

        replica = self._replica
        request = Generate(
            request_id=f"chat-{len(messages)}",
            prompt_ids=replica.chat_ids(messages),
            sampling=replica.sampling(seed=None, **self._options),
        )
        async for delta in replica.client.generate(request):
            yield delta.text

    async def close(self) -> None:
        await self._replica.client.close()


class _Remote:
    """Answers from a server, through the same API that everyone uses."""

    def __init__(
        self, url: str | None, name: str | None, api_key: str | None, options: dict[str, Any]
    ) -> None:
        import httpx

        from mxn.cli.local_key import local_key
        from mxn.cli.remote import is_here, reaching

        self._url = (url or _running_url()).rstrip("/")
        self._name, self._options = name, options
        # This machine's key is no business of others, and no proxy stands before ourselves.
        key = api_key or (local_key() if is_here(self._url) else None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with reaching(self._url):
            self._http = httpx.AsyncClient(
                base_url=self._url, headers=headers, timeout=600, trust_env=not is_here(self._url)
            )

    async def open(self) -> str:
        from mxn.cli.remote import check, reaching

        with reaching(self._url):
            response = await self._http.get("/v1/models")
        names = [entry["id"] for entry in check(response)["data"]]
        self._name = self._name or (names[0] if names else None)
        if self._name not in names:
            raise NotFoundError(f"{self._url} serves {', '.join(names)}, not {self._name!r}")
        return f"{self._name} at {self._url}"

    async def answer(self, messages: list[dict[str, str]]) -> Any:
        from mxn.cli.remote import reaching, stream_chat

        body = {"model": self._name, "messages": messages, "stream": True}
        body |= {key: value for key, value in self._options.items() if value is not None}
        with reaching(self._url):
            async for text in stream_chat(self._http, body):
                yield text

    async def close(self) -> None:
        await self._http.aclose()


def _running_url() -> str:
    from mxn.serve.running import list_servers

    servers = list_servers()
    if not servers:
        raise NotFoundError(
            "no mxn server runs on this machine",
            hint="start one with `mxn up`, or name a model: mxn chat MODEL",
        )
    return servers[0].url


async def _chat(source: Any, messages: list[dict[str, str]]) -> None:
    who = await source.open()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"chatting with {who}; /clear forgets, /exit ends", file=sys.stderr)
    system = list(messages)
    try:
        while (text := await _read_line(is_terminal)) not in (None, "/exit", "/quit"):
            if text == "/clear":
                messages = list(system)
            elif text:
                await _turn(source, messages, str(text))
    finally:
        await source.close()


async def _turn(source: Any, messages: list[dict[str, str]], text: str) -> None:
    messages.append({"role": "user", "content": text})
    parts: list[str] = []
    try:
        async for piece in source.answer(messages):
            parts.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except UserError as error:
        messages.pop()
        print(f"error: {error}", file=sys.stderr)
        return
    sys.stdout.write("\n")
    messages.append({"role": "assistant", "content": "".join(parts)})


async def _read_line(is_terminal: bool) -> str | None:
    """Return the next line, None at the end.

    In a thread of its own that nobody waits for: after Ctrl-C, `asyncio.run` would wait for a
    thread of its pool until the user has typed one more line.
    """
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def give(text: str | None, error: Exception | None = None) -> None:
        if line.done():
            return
        if error is None:
            line.set_result(text)
        else:
            line.set_exception(error)

    def read() -> None:
        result: tuple[str | None, Exception | None]
        try:
            result = input("> " if is_terminal else "").strip(), None
        except EOFError:
            result = None, None
        except Exception as error:  # such as bytes that are no text; raised where it is awaited
            result = None, error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(give, *result)

    threading.Thread(target=read, name="mxn-read-line", daemon=True).start()
    return await line
