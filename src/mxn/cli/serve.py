"""`mxn serve`: one or more models behind the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxn.cli.options import (
    Dtype,
    Host,
    Kv,
    MaxContext,
    Otlp,
    Port,
    ReasoningParser,
    Speculation,
    Threads,
    ToolParser,
    Weights,
)
from mxn.errors import ConfigError, MxnError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mxn.engine.protocol import ModelInfo
    from mxn.serve.launch import ModelRequest


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Directories, hub ids or names of shipped models."),
    ],
    name: Annotated[
        list[str] | None, typer.Option(help="Name of each model for callers, in the same order.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Annotated[
        str,
        typer.Option(
            help="Device such as cpu, cuda:0, npu:0, sim:0; auto: the best present. "
            "Several, such as cuda:0,cuda:1: a replica on each."
        ),
    ] = "auto",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Running copies of each model.")
    ] = None,
    stall_limit: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Seconds of silence after which a stream goes on from another replica.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    weights: Weights = None,
    kv: Kv = None,
    speculation: Speculation = None,
    threads: Threads = 0,
    max_context: MaxContext = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Requests that run at the same time.")
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="New tokens computed in one step.")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory of the key/value cache, such as 4GiB.")
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Keep pages of earlier prompts for later ones.")
    ] = True,
    fallback: Annotated[
        bool, typer.Option(help="Run models without a native spec through transformers.")
    ] = True,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="LoRA adapter in PEFT's layout; repeatable."),
    ] = None,
    lora_folder: Annotated[
        Path | None,
        typer.Option(help="Adapters that callers load must lie below it. Default: anywhere."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MXN_API_KEY", help="Key that callers must send; repeatable."),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of a ledger: keys, budgets, usage, files and batches. Default: none."
        ),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds a request may take.")
    ] = None,
    tool_parser: ToolParser = None,
    reasoning_parser: ReasoningParser = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    otlp: Otlp = None,
) -> None:
    """Serve MODEL... behind an OpenAI-compatible API."""
    from mxn import env
    from mxn.cli.replica import aliases, config_for
    from mxn.serve.fleet import PoolRules
    from mxn.serve.launch import ModelRequest, spread
    from mxn.units import parse_bytes

    names = name or [_served_name(model) for model in models]
    if len(names) != len(models):
        raise ConfigError(f"{len(models)} models but {len(names)} names: {', '.join(names)}")
    adapters = _adapters(lora or [], len(models))
    devices = spread(env.get("MXN_DEVICE") if device == "auto" else device, replicas)
    rules = PoolRules() if stall_limit is None else PoolRules(stall_floor_s=stall_limit)
    requests = [
        ModelRequest(
            name=served_name,
            devices=devices,
            rules=rules,
            adapters=adapters,
            aliases=aliases(model, served_name) if models.count(model) == 1 else (),
            config=config_for(
                model, device=devices[0], dtype=dtype, weights=weights, kv=kv, threads=threads,
                max_context=max_context, speculation=speculation,
                max_sequences=max_sequences, max_batch_tokens=max_batch_tokens,
                kv_bytes=parse_bytes(kv_memory) if kv_memory else None,
                prefix_caching=prefix_caching, allow_fallback=fallback,
            ),
        )
        for served_name, model in zip(names, models, strict=True)
    ]  # fmt: skip
    run_server(
        requests, host, port, tuple(api_key or ()), database=database,
        request_timeout_s=request_timeout, tls_files=(tls_cert, tls_key),
        adapter_folder=lora_folder, tool_parser=tool_parser, reasoning_parser=reasoning_parser,
        otlp=otlp,
    )  # fmt: skip


def _served_name(model: str) -> str:
    """Return the name that callers use: the last part of a path or hub id, without .gguf."""
    return (Path(model).name or Path(model).resolve().name).removesuffix(".gguf")


def _adapters(given: list[str], num_models: int) -> tuple[tuple[str, str], ...]:
    """Return (name, folder) of each `--lora`. Raises: ConfigError."""
    if given and num_models > 1:
        raise ConfigError(
            f"--lora needs one model to adapt, got {num_models}",
            hint="load it later: POST /v1/load_lora_adapter takes a `model`",
        )
    pairs = []
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ConfigError(f"--lora {text!r} is not NAME=PATH")
        pairs.append((name, str(Path(path).expanduser().resolve())))
    return tuple(pairs)


def run_server(
    requests: list[ModelRequest],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    *,
    greeting: Callable[[str], str] | None = None,
    database: str | None = None,
    request_timeout_s: float | None = None,
    adapter_folder: Path | None = None,
    tls_files: tuple[Path | None, Path | None] = (None, None),
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    otlp: str | None = None,
) -> None:
    """Serve until interrupted; progress bars while the models load.

    `greeting` gets the base URL once it is known and returns what to print on stdout.
    Raises: the reason of the first failure when none of the models could be loaded.
    """
    import logging
    import signal

    from mxn import env
    from mxn.cli.replica import LoadingBar
    from mxn.serve.app import create_app
    from mxn.serve.launch import check_names, load_models
    from mxn.serve.running import announce
    from mxn.serve.served import ServedModels
    from mxn.serve.server import Tls, run
    from mxn.serve.settings import ServeSettings
    from mxn.serve.tracing import Tracing

    logging.basicConfig(level=env.get("MXN_LOG").upper(), format="%(levelname)s %(message)s")
    for name in ("alembic", "uvicorn"):  # what they announce says nothing to an operator
        logging.getLogger(name).setLevel(logging.WARNING)
    check_names(requests)
    if not all(api_keys):
        raise ConfigError("an API key is empty", hint="give --api-key a value or leave it out")
    served = ServedModels()
    failures: list[MxnError] = []

    async def startup(models: ServedModels) -> None:
        try:
            with LoadingBar() as bar:
                await load_models(models, requests, bar.update)
        except MxnError as error:  # there is nothing to serve: end as on Ctrl-C
            failures.append(error)
            signal.raise_signal(signal.SIGINT)
            return
        for model in models:
            typer.echo(_describe(model.name, model.info), err=True)

    for request in requests:
        served.expect(request.name)
    certificate, tls_key = tls_files
    if (certificate is None) != (tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together")
    tls = Tls(certificate=certificate, key=tls_key) if certificate and tls_key else None
    accounting = None
    if database not in (None, "none"):
        from mxn.ledger.database import Database
        from mxn.serve.accounting import Accounting

        accounting = Accounting(Database.open(database))
    app = create_app(
        served,
        ServeSettings(
            api_keys=api_keys,
            request_timeout_s=request_timeout_s,
            adapter_folder=None if adapter_folder is None else str(adapter_folder),
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        ),
        startup=startup,
        accounting=accounting,
        tracing=Tracing.open(otlp, "mxn"),
    )
    files: list[Path] = []

    def on_listening(url: str) -> None:
        needs_key = bool(api_keys) or accounting is not None
        files.append(announce(url, [r.name for r in requests], needs_key=needs_key))
        if greeting:
            typer.echo(greeting(url))
        typer.echo(f"listening on {url}", err=True)

    def on_drain() -> None:
        app.state.mxn.is_draining = True

    def remove_files() -> None:
        for file in files:
            file.unlink(missing_ok=True)

    def on_sigterm(*_: object) -> None:
        # The server has stopped and passes the signal on; by default it would end us right here.
        remove_files()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        run(app, host, port, on_listening=on_listening, on_drain=on_drain, tls=tls)
    except KeyboardInterrupt:
        if not failures:
            raise
    finally:
        remove_files()
    if failures:
        raise failures[0]


def _describe(name: str, info: ModelInfo) -> str:
    how = "native" if info.native else "through transformers"
    size = f"{info.num_parameters / 1e6:.3g} M parameters"
    return (
        f"{name}: {info.family} ({how}), {size}, {info.dtype} on {info.device} ({info.chip}),"
        f" context {info.max_context}, loaded in {info.load_s:.1f} s"
    )
