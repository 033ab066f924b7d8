"""Runs an app on uvicorn: bind, serve, drain. Knows sockets and signals, no models.

SIGINT or SIGTERM: no new connections, running requests get `drain_s` to finish, then they are
cancelled. Start at `run`; tests and benchmarks use `running`.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from mxn.errors import ConfigError, InternalError
from mxn.serve.wire import Http

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the pause of a client that polls once a minute
_START_LIMIT_S = 30.0

OnListening = Callable[[str], None]


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises: ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as exc:  # OverflowError: no port number
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {getattr(exc, 'strerror', None) or exc}",
            hint="choose another --port, or --port 0 for a free one",
        ) from exc
    sock.listen(_BACKLOG)
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Return the base URL of a bound socket, such as http://127.0.0.1:8000."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A certificate chain and its key, both PEM files."""

    certificate: Path
    key: Path

    def __post_init__(self) -> None:
        for path in (self.certificate, self.key):
            if not path.is_file():
                raise ConfigError(
                    f"{path} is no file", hint="--tls-cert and --tls-key are PEM files"
                )


class Server(uvicorn.Server):
    """uvicorn with our settings that says when it is listening, and drains in two steps.

    On a signal it first calls `on_drain`, so that /health sends balancers elsewhere, and goes on
    serving for `leave_s`; then it takes no new connections and gives running requests `drain_s`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        drain_s: float,
        on_listening: OnListening | None = None,
        tls: Tls | None = None,
        on_drain: Callable[[], None] | None = None,
        leave_s: float = 0.0,
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=Http,
            ws="none",
            lifespan="on",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            access_log=False,  # paths and clients of users stay out of the log
            log_config=None,
            server_header=False,
            proxy_headers=False,  # nothing here depends on a client's address
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        super().__init__(config)
        self._on_listening = on_listening
        self._on_drain = on_drain
        self._leave_s = leave_s
        self._scheme = "https" if tls else "http"
        self._leaving: threading.Timer | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal say that we leave; on the second end at once."""
        if self._on_drain is not None:
            self._on_drain()
        if not self._leave_s or self._leaving is not None:
            if self._leaving is not None:
                self._leaving.cancel()
            super().handle_exit(sig, frame)
            return
        handle = functools.partial(super().handle_exit, sig, frame)
        self._leaving = threading.Timer(self._leave_s, handle)
        self._leaving.start()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Drained is what SIGTERM asked for, so the process then ends with 0, not by the signal."""
        with super().capture_signals():
            yield
            if not self.force_exit:
                self._captured_signals = [
                    sig for sig in self._captured_signals if sig != signal.SIGTERM
                ]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_listening is not None and sockets:
            self._on_listening(url_of(sockets[0], self._scheme))


def run(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain_s: float = 30.0,
    on_listening: OnListening | None = None,
    tls: Tls | None = None,
    on_drain: Callable[[], None] | None = None,
    leave_s: float = 0.0,
    sock: socket.socket | None = None,
) -> None:
    """Serve until a signal, then drain. `on_listening` gets the base URL once requests are taken.

    `sock` is a socket that is bound already. Raises: ConfigError when the address cannot be had.
    """
    server = Server(
        app, drain_s=drain_s, on_listening=on_listening, tls=tls, on_drain=on_drain, leave_s=leave_s
    )
    server.run(sockets=[sock or bind(host, port)])


async def serve(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain_s: float = 30.0,
    on_listening: OnListening | None = None,
) -> None:
    """Like `run`, inside a running event loop."""
    sock = bind(host, port)
    await Server(app, drain_s=drain_s, on_listening=on_listening).serve(sockets=[sock])


@contextmanager
def running(app: ASGIApp, *, drain_s: float = 1.0) -> Iterator[str]:
    """Serve `app` from a thread on a free loopback port; yield its base URL.

    Raises: InternalError when the server does not come up.
    """
    sock = bind("127.0.0.1", 0)
    is_up = threading.Event()
    server = Server(app, drain_s=drain_s, on_listening=lambda _: is_up.set())

    def work() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[sock]))
        is_up.set()

    thread = threading.Thread(target=work, name="mxn-server", daemon=True)
    thread.start()
    if not is_up.wait(_START_LIMIT_S) or not server.started:
        raise InternalError(f"the server did not start within {_START_LIMIT_S:.0f} s")
    try:
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join(_START_LIMIT_S)
