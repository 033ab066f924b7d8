"""`mxn ps`: the servers on this machine and what they are doing."""

from __future__ import annotations

import json
from typing import Any

import typer

from mxn.cli.options import Json


def ps(as_json: Json = False) -> None:
    """List the mxn servers on this machine, their models and their load."""
    from mxn.serve.running import list_servers

    rows = [row for server in list_servers() for row in _rows(server)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no server is running; start one with `mxn up` or `mxn serve MODEL`")
        return
    _print(rows)


def _rows(server: Any) -> list[dict[str, Any]]:
    import httpx

    base = {"pid": server.pid, "url": server.url}
    try:
        load = httpx.get(f"{server.url}/load", timeout=2.0).json()
    except (httpx.HTTPError, ValueError) as error:
        return [base | {"model": "-", "state": f"does not answer: {error}"}]
    models = load.get("models", {})
    if not models:
        return [base | {"model": ", ".join(server.models), "state": "loading"}]
    return [base | _row(name, stats) for name, stats in models.items()]


def _row(name: str, stats: dict[str, Any] | None) -> dict[str, Any]:
    if stats is None:
        return {"model": name, "state": "dead"}
    return {"model": name, "state": "ready", **stats}


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in columns))
    Console().print(table)
