"""`mxn gateway`: keys, budgets, routing and failover in front of replicas on other servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxn.cli.options import Host, Otlp, Port, ReasoningParser, ToolParser


def gateway(
    replica: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=URL[,option=value…]",
            help="A replica, such as qwen=http://10.0.0.7:8000,kind=mxn; repeatable.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with these options and a list of replicas.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of the ledger; 'none': no keys and no accounts.", envvar="MXN_DATABASE"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that take requests.")] = 1,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MXN_API_KEY", help="A key that is always let in, without an account."),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds a request may take.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at the same time.")
    ] = None,
    stall_limit: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds of silence after which a stream moves on."),
    ] = None,
    tool_parser: ToolParser = None,
    reasoning_parser: ReasoningParser = None,
    drain: Annotated[float, typer.Option(help="Seconds for running requests at the end.")] = 30.0,
    leave: Annotated[
        float, typer.Option(help="Seconds to go on serving with /health at 503, at the end.")
    ] = 0.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    log_format: Annotated[
        str, typer.Option(help="text or json: a line for each request.")
    ] = "text",
    otlp: Otlp = None,
) -> None:
    """Serve models of other servers behind one API with keys, budgets and failover."""
    from mxn.serve.config import GatewayConfig
    from mxn.serve.gateway_server import run_gateway

    given = GatewayConfig.load(config) if config else GatewayConfig()
    run_gateway(
        given.merged(
            replicas=replica, host=host, port=port, database=database, workers=workers,
            api_keys=api_key, request_timeout_s=request_timeout, max_requests=max_requests,
            stall_limit_s=stall_limit, tool_parser=tool_parser,
            reasoning_parser=reasoning_parser, drain_s=drain, leave_s=leave,
            tls_cert=str(tls_cert) if tls_cert else None, tls_key=str(tls_key) if tls_key else None,
            log_format=log_format, otlp=otlp,
        ),
        announce=lambda url: typer.echo(f"listening on {url}", err=True),
    )  # fmt: skip
