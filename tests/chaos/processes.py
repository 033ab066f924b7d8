"""Servers as processes that are really killed: replicas, gateways, and what restarts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_LIMIT_S = 120.0
REPLICA_KEY = "sk-replica-key-of-this-test"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass(slots=True)
class Server:
    """One `mxn` command on a port of its own; it comes back on the same port."""

    name: str
    arguments: list[str]
    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    num_kills: int = 0
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    def start(self) -> None:
        command = [sys.executable, "-m", "mxn.cli.main", *self.arguments, "--port", str(self.port)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env=os.environ | {"MXN_HOME": str(self.home), "OMP_NUM_THREADS": "1"} | self.env,
                start_new_session=True,  # so that a kill reaches its engines too
            )

    def kill(self) -> None:
        """End the server and its engine processes as a power cut would."""
        assert self.process is not None
        self.num_kills += 1
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        until_s = time.monotonic() + START_LIMIT_S
        while not self.is_ready():
            assert self.process is not None
            assert self.process.poll() is None, (
                f"{self.name} ended:\n{self.log.read_text()[-3000:]}"
            )
            assert time.monotonic() < until_s, f"{self.name}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)


def replica(name: str, model: Path, home: Path, *options: str) -> Server:
    arguments = [
        "serve", str(model), "--name", "m", "--threads", "1", "--api-key", REPLICA_KEY, *options,
    ]  # fmt: skip
    return Server(name, arguments, home)


def gateway(name: str, replicas: list[Server], database: str, home: Path, *options: str) -> Server:
    arguments = ["gateway", "--database", database, "--log-format", "json", *options]
    for item in replicas:
        arguments += ["--replica", f"m={item.url},kind=mxn,key=env:REPLICA_KEY"]
    return Server(name, arguments, home, env={"REPLICA_KEY": REPLICA_KEY})
