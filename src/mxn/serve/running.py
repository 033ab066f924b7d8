"""Which mxn servers run on this machine: one small file for each, in MXN_HOME/servers.

A file whose process is gone is removed by whoever finds it. Holds no keys. Start at `list_servers`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from mxn import env


class RunningServer(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    url: str
    models: list[str]
    started_s: float  # Unix time
    needs_key: bool = False


def _folder() -> Path:
    path = env.home() / "servers"
    path.mkdir(exist_ok=True)
    return path


def announce(url: str, models: list[str], *, needs_key: bool) -> Path:
    """Write the file of this process; the caller removes it when the server stops."""
    server = RunningServer(
        pid=os.getpid(), url=url, models=models, started_s=time.time(), needs_key=needs_key
    )
    path = _folder() / f"{server.pid}.json"
    path.write_bytes(msgspec.json.encode(server))
    return path


def list_servers() -> list[RunningServer]:
    """Return the servers whose process is alive, the newest first."""
    found = []
    for path in _folder().glob("*.json"):
        try:
            server = msgspec.json.decode(path.read_bytes(), type=RunningServer)
        except (msgspec.MsgspecError, FileNotFoundError):
            path.unlink(missing_ok=True)  # half written by a process that died, or just removed
            continue
        if _is_alive(server.pid):
            found.append(server)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda server: -server.started_s)


def _is_alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
