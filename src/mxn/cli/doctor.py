"""`mxn doctor`: what mxn sees on this machine, what it chose, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from typing import Any

import typer

from mxn import __version__, env
from mxn.cli.options import Json

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "fastapi", "uvicorn",
    "pyzmq", "msgspec",
)  # fmt: skip


def doctor(as_json: Json = False) -> None:
    """Print versions, devices with their evidence, settings and their origin, and any problem."""
    report = {
        "mxn": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cores": _cores(),
        "devices": _devices(),
        "settings": _settings(),
        "problems": _problems(),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=str))
        return
    _print(report)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> dict[str, int | None]:
    from mxn.engine.config import usable_cores

    return {"machine": os.cpu_count(), "usable": usable_cores()}


def _devices() -> list[dict[str, Any]]:
    from mxn.chips import default_dtype, detect, free_memory
    from mxn.units import format_bytes

    return [
        {
            "id": device.id,
            "chip": device.chip,
            "name": device.name,
            "memory": format_bytes(device.memory_bytes),
            "free": format_bytes(free_memory(device)),
            "bfloat16 checkpoints run in": ": ".join(default_dtype(device, "bfloat16")),
            "evidence": list(device.evidence),
        }
        for device in detect()
    ]


def _settings() -> dict[str, str]:
    return {
        variable.name: f"{env.get(variable.name)!r} "
        + ("(environment)" if variable.name in os.environ else "(default)")
        for variable in env.VARIABLES
    }


def _problems() -> list[str]:
    """Return what would surprise a user later, each with what to do."""
    found = [f"package {name} is missing" for name in _PACKAGES if _version(name) is None]
    if shutil.which("g++") is None:
        found.append("no g++: the simulated chip cannot be built (only tests need it)")
    home = env.home()
    if not os.access(home, os.W_OK):
        found.append(f"{home} is not writable: set MXN_HOME")
    return found


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for key in ("mxn", "python", "system", "cores"):
        console.print(f"[bold]{key}[/]  {report[key]}", highlight=False)
    for title in ("packages", "settings"):
        table = Table(title=title, box=None, title_justify="left", show_header=False)
        for name, value in report[title].items():
            table.add_row(name, str(value))
        console.print(table)
    for device in report["devices"]:
        table = Table(title=device["id"], box=None, title_justify="left", show_header=False)
        for name, value in device.items():
            table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
        console.print(table)
    problems = report["problems"] or ["none"]
    console.print("[bold]problems[/]  " + "\n          ".join(problems), highlight=False)
