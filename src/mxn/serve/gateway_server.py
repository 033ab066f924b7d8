"""Runs a gateway: checks what it was told, opens the ledger, connects replicas, serves.

Start at `run_gateway`. With several workers each does all of it in a process of its own, on one
socket.
"""

from __future__ import annotations

import gc
import logging
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mxn import env
from mxn.errors import ConfigError
from mxn.serve.config import GatewayConfig

if TYPE_CHECKING:
    from mxn.serve.peers import Peers
    from mxn.serve.replicas.spec import ReplicaSpec
    from mxn.serve.settings import ServeSettings

log = logging.getLogger("mxn.serve")


def run_gateway(config: GatewayConfig, announce: Callable[[str], None]) -> None:
    """Serve until a signal. `announce` gets the base URL once requests are taken.

    Raises: ConfigError before anything is opened.
    """
    from mxn.serve.front import by_model
    from mxn.serve.peers import Peers, bind_all
    from mxn.serve.replicas.spec import ReplicaSpec
    from mxn.serve.server import Tls, bind, url_of
    from mxn.serve.workers import supervise

    logging.basicConfig(level=env.get("MXN_LOG").upper(), format="%(levelname)s %(message)s")
    for name in ("alembic", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    specs = [ReplicaSpec.parse(text) for text in config.replicas]
    if not specs:
        raise ConfigError(
            "a gateway needs at least one replica",
            hint="--replica MODEL=URL, or `replicas` in the --config file",
        )
    by_model(specs)
    _settings(config)
    if config.tls_cert and config.tls_key:
        Tls(certificate=Path(config.tls_cert), key=Path(config.tls_key))
    _migrate(config)
    sock = bind(config.host, config.port)
    if config.workers == 1:
        _serve(config, specs, sock, announce)
        return
    announce(url_of(sock, "https" if config.tls_cert else "http"))
    with tempfile.TemporaryDirectory(prefix="mxn-") as folder:
        sockets = bind_all(Path(folder), config.workers)
        supervise(
            lambda index: _serve(config, specs, sock, lambda _: None, Peers(sockets, index)),
            config.workers,
            on_end=sock.close,  # else connections that no worker takes any more would hang
        )


def _settings(config: GatewayConfig) -> ServeSettings:
    """Raises: ConfigError for parsers that do not exist."""
    from mxn.serve.settings import ServeSettings

    return ServeSettings(
        api_keys=tuple(config.api_keys),
        max_body_bytes=config.max_body_bytes,
        request_timeout_s=config.request_timeout_s,
        max_requests=config.max_requests,
        tool_parser=config.tool_parser,
        reasoning_parser=config.reasoning_parser,
    )


def _migrate(config: GatewayConfig) -> None:
    """Bring the tables up to date once, before workers open them."""
    if config.database == "none":
        return
    from mxn.ledger.database import Database

    Database.open(config.database).close()


def _serve(
    config: GatewayConfig,
    specs: list[ReplicaSpec],
    sock: socket.socket,
    announce: Callable[[str], None],
    peers: Peers | None = None,
) -> None:
    from mxn.ledger.database import Database
    from mxn.serve.accounting import Accounting
    from mxn.serve.app import create_app
    from mxn.serve.fleet import PoolRules
    from mxn.serve.front import add_foreign, by_model, connect
    from mxn.serve.logs import RequestLog
    from mxn.serve.running import announce as announce_server
    from mxn.serve.served import ServedModels
    from mxn.serve.server import Tls, run
    from mxn.serve.status import tell
    from mxn.serve.tracing import Tracing

    groups = by_model(specs)
    served = ServedModels()
    for name, group in groups.items():
        if group[0].via != "pass":
            served.expect(name)
    limit_s = config.stall_limit_s
    rules = PoolRules() if limit_s is None else PoolRules(stall_floor_s=limit_s)
    accounting = None
    if config.database != "none":
        accounting = Accounting(Database(config.database))
    settings = _settings(config)

    async def startup(models: ServedModels) -> None:
        if peers is not None:
            await peers.listen(lambda: tell(state))
        await connect(models, groups, rules)

    app = create_app(
        served,
        settings,
        startup=startup,
        accounting=accounting,
        tracing=Tracing.open(config.otlp, "mxn-gateway"),
        on_end=[RequestLog()] if config.log_format == "json" else [],
    )
    state = app.state.mxn
    state.peers = peers
    add_foreign(state.upstreams, groups)
    files: list[Path] = []

    def on_listening(url: str) -> None:
        needs_key = accounting is not None or bool(config.api_keys)
        files.append(announce_server(url, list(groups), needs_key=needs_key))
        announce(url)

    def on_drain() -> None:
        state.is_draining = True

    tls = None
    if config.tls_cert and config.tls_key:
        tls = Tls(certificate=Path(config.tls_cert), key=Path(config.tls_key))
    # What was loaded until now never becomes garbage; looking at it again costs tail latency.
    gc.collect()
    gc.freeze()
    try:
        run(
            app, sock=sock, drain_s=config.drain_s, leave_s=config.leave_s, tls=tls,
            on_listening=on_listening, on_drain=on_drain,
        )  # fmt: skip
    finally:
        for file in files:
            file.unlink(missing_ok=True)
