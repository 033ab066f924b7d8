"""Which mxn servers run on this machine: one small file for each, in MXN_HOME/servers.

A file whose process is gone is removed by whoever finds it. Holds no keys. Start at `list_servers`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from mxn import env

_CLOCK_SLACK_S = 5.0  # the kernel's start times are counted from boot and drift a little


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
    # In one step: whoever reads half a file takes it for the rest of a dead server and removes it.
    written = path.with_suffix(".tmp")
    written.write_bytes(msgspec.json.encode(server))
    written.replace(path)
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
        if _is_alive(server):
            found.append(server)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda server: -server.started_s)


def _is_alive(server: RunningServer) -> bool:
    """Return whether the process still runs, and is not another one that got its number."""
    import psutil

    try:
        process = psutil.Process(server.pid)
        is_same = process.create_time() <= server.started_s + _CLOCK_SLACK_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
