"""`mxn models`: what is on this machine, and which families mxn knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mxn.cli.options import Json


def models(
    directories: Annotated[
        list[Path] | None, typer.Argument(help="Folders to look into as well.")
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="List the native families instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the models on this machine: shipped ones, the hub cache, and DIRECTORIES."""
    if families:
        _print_families(as_json)
        return
    from mxn.models.catalogue import find_models
    from mxn.units import format_bytes

    found = find_models(tuple(directories or ()))
    if as_json:
        rows = [
            {
                "name": e.name,
                "path": str(e.path),
                "architecture": e.architecture,
                "support": e.support,
                "source": e.source,
                "bytes": e.num_bytes,
            }
            for e in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    _table(
        ("model", "architecture", "runs as", "weights", "from"),
        [(e.name, e.architecture, e.support, format_bytes(e.num_bytes), e.source) for e in found],
    )


def _print_families(as_json: bool) -> None:
    from mxn.models.families import decoder_families
    from mxn.models.families.encoders import ENCODER_FAMILIES

    rows = [(f.name, "decoder", ", ".join(f.architectures)) for f in decoder_families()]
    rows += [
        (f.name, "encoder", ", ".join(f"{prefix}*" for prefix in f.class_prefixes))
        for f in ENCODER_FAMILIES
    ]
    if as_json:
        fields = ("family", "kind", "architectures")
        typer.echo(json.dumps([dict(zip(fields, row, strict=True)) for row in rows], indent=2))
        return
    _table(("family", "kind", "architectures"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
