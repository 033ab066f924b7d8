"""`mxn ps`: the servers on this machine and what they are doing."""

from __future__ import annotations

import json
import sys
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

    from mxn.cli.local_key import local_key

    base = {"pid": server.pid, "url": server.url}
    key = local_key() if server.needs_key else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # No proxy: these are servers of this machine.
        with httpx.Client(
            base_url=server.url, headers=headers, timeout=3.0, trust_env=False
        ) as http:
            health = http.get("/health").json()["models"]
            load = http.get("/load")
            # A server with a key that is not this machine's says how it is, not how busy.
            busy = load.json()["models"] if load.is_success else {}
    except (httpx.HTTPError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
        return [base | {"model": ", ".join(server.models), "state": f"does not answer: {reason}"}]
    return [
        base | {"model": name, "state": found["status"]} | (busy.get(name) or {})
        for name, found in health.items()
    ]


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pid", "url", "model", "state", "running", "waiting", "pages", box=None)
    for row in rows:
        pages = f"{row['kv_pages_used']}/{row['kv_pages_total']}" if "running" in row else ""
        cells = [row.get(key, "") for key in ("pid", "url", "model", "state", "running", "waiting")]
        table.add_row(*map(str, cells), pages)
    # A file or a pipe has no width: names are for copying, so they are never cut there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
