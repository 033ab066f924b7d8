"""`mxn up`: the platform on this machine, with the models that ship with mxn."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mxn.cli.options import Device, Host, Otlp, Port, Threads
from mxn.errors import NotFoundError


def up(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL...]", help="More models to serve beside the shipped ones."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    threads: Threads = 0,
    key: Annotated[bool, typer.Option(help="Ask callers for this machine's key.")] = True,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="MXN_DATABASE", help="URL of the ledger; 'none': no accounts, only the key."
        ),
    ] = None,
    otlp: Otlp = None,
) -> None:
    """Start mxn on this machine, and print the address, a key and a first request."""
    from pathlib import Path

    from mxn.cli.local_key import ensure_local_key
    from mxn.cli.replica import aliases, config_for
    from mxn.cli.serve import run_server
    from mxn.ledger.database import Database, default_url
    from mxn.ledger.keys import import_key
    from mxn.models.catalogue import shipped_dir, shipped_models
    from mxn.serve.launch import ModelRequest

    shipped = list(shipped_models())
    if not shipped:
        raise NotFoundError(
            f"no model ships with this installation: {shipped_dir()} is empty",
            hint="install from a clone, or name a model: mxn serve MODEL",
        )
    requests = [
        ModelRequest(
            name=Path(model).name,
            aliases=aliases(model, Path(model).name),
            config=config_for(model, device=device, threads=threads),
        )
        for model in [*shipped, *(models or [])]
    ]
    api_key = ensure_local_key() if key else None
    url = None if database == "none" or not key else database or default_url()
    if url is not None and api_key is not None:
        ledger = Database.open(url)
        import_key(ledger, api_key)
        ledger.close()
    run_server(
        requests, host, port, (api_key,) if api_key and url is None else (), database=url,
        greeting=lambda url: _first_request(url, shipped[0], api_key), otlp=otlp,
    )  # fmt: skip


def _first_request(base_url: str, model: str, api_key: str | None) -> str:
    url = f"{base_url}/v1"
    header = f' -H "Authorization: Bearer {api_key}"' if api_key else ""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Who goes there?"}]}
    )
    return f"""
  address  {url}
  key      {api_key or "none needed"}
  request  curl {url}/chat/completions{header} -H "Content-Type: application/json" \\
             -d '{body}'
"""
