"""The servers of mixed_load.py: `mxn serve`, llama-server, and a wrapper around OpenVINO GenAI.

Each one is a process of its own on a port of its own; idle ones sleep in a system call. Knows how
they are started; knows no measurements. Start at `Server.started`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import contenders
import httpx
from contenders import HERE, Contender
from protocol import Failed
from setup_peers import llama_env
from traffic import Target

MODEL = "bench"  # as callers name it


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every server gets: cores, requests at the same time, tokens of the longest one."""

    threads: int
    slots: int
    context: int


@dataclass(slots=True)
class Server:
    """A running server. Invariant: `stop` ends it and what it started."""

    name: str
    target: Target
    process: subprocess.Popen[bytes] | None  # None: started by somebody else
    log: Path | None = None

    @classmethod
    def started(
        cls, contender: Contender, model: Path, peers: Path, sizes: Sizes, limit_s: float
    ) -> Server:
        """Start one and wait until it answers. Raises: Failed with the end of its log."""
        built = contenders.built(contender, model, peers)
        port = _free_port()
        words, env = command(contender, built, peers, sizes, port)
        log = peers / "logs" / f"server-{model.name}-{contender.name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env=os.environ | env, process_group=0,
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        server = cls(contender.name, Target(url, MODEL, limit_s), process, log)
        try:
            server.wait(limit_s)
        except Failed:
            server.stop()
            raise
        return server

    def wait(self, limit_s: float) -> None:
        """Wait until a request is answered. Raises: Failed when the server ends or takes longer."""
        until_s = time.monotonic() + limit_s
        body = {"model": MODEL, "prompt": [300, 301], "max_tokens": 1, "stream": True}
        last = ""
        while time.monotonic() < until_s:
            if self.process is not None and self.process.poll() is not None:
                raise Failed(f"{self.name} ended with {self.process.returncode}: {self._why()}")
            try:
                found = httpx.post(f"{self.target.url}/v1/completions", json=body, timeout=limit_s)
                if found.status_code == 200:
                    return
                last = f"{found.status_code} {found.text[:300]}"
            except httpx.TransportError as error:
                last = str(error)
            time.sleep(0.2)
        raise Failed(f"{self.name} was not ready in {limit_s:g} s: {last}; {self._why()}")

    def stop(self) -> None:
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(10)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _why(self) -> str:
        if self.log is None:
            return "no log"
        return contenders.reason(self.log.read_text(errors="replace"))


def command(
    contender: Contender, built: Path, peers: Path, sizes: Sizes, port: int
) -> tuple[list[str | Path], dict[str, str]]:
    """Return the words that start a server, and its environment. Raises: Failed for no server."""
    threads, context = str(sizes.threads), sizes.context + 64
    match contender.engine:
        case "mxn":
            weights, _, cache = contender.weights.partition("/")
            formats = () if weights == "plain" else ("--weights", weights)
            formats += ("--kv", cache) if cache else ()
            return [
                Path(sys.executable).with_name("mxn"), "serve", built, *formats, "--name", MODEL,
                "--port", str(port), "--threads", threads, "--max-context", str(context),
                "--max-sequences", str(sizes.slots),
            ], {"OMP_NUM_THREADS": threads}  # fmt: skip
        case "openvino":
            return [
                peers / "openvino/bin/python", HERE / "peers/openvino_server.py", built, "--port",
                str(port), "--threads", threads, "--slots", str(sizes.slots), "--kv-tokens",
                str(sizes.slots * context),
            ], {}  # fmt: skip
        case "llama.cpp":
            # No store of old prompts: none comes back, and saving each would cost it time.
            return [
                peers / "llama_build/bin/llama-server", "-m", built, "-t", threads, "-tb", threads,
                "-np", str(sizes.slots), "-c", str(sizes.slots * context), "--cache-ram", "0",
                "--no-webui", "--host", "127.0.0.1", "--port", str(port),
            ], llama_env(peers)  # fmt: skip
    raise Failed(f"{contender.engine} has no server here; give a running one with --urls")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
