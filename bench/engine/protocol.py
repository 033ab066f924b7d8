"""How the benchmark talks to an engine: one process each, one JSON document a line, in lock step.

Standard library only: a runner imports this file from its own virtual environment. Knows no engine.
Start at `Runner` (what an engine must do), `serve` (its side) and `Peer` (ours).
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

READY_TOKENS = 16  # length of the prompt whose first token ends "load to first token"


class Refused(Exception):
    """An engine that cannot do a thing says why; the cell of the table then says "no"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`model` is the Hugging Face folder, `built` the file or folder that `convert` made of it."""

    model: str
    built: str
    weights: str  # the format as this engine calls it, such as int4, q4_0
    threads: int
    max_context: int  # of one sequence, new tokens included
    max_sequences: int
    kv_tokens: int  # room of the cache: what all columns together keep, and some more


class Runner(Protocol):
    """One engine. Times are the engine's own: the caller's share (JSON, pipes) is not in them."""

    def load(self, load: Load) -> dict[str, Any]:
        """Load, and return the versions and settings to print."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds to the first token behind a prompt that is in no cache."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Return the seconds of `steps` steps with one new token per sequence in each.

        The prompts are filled in before the clock starts, or are there from an earlier call.
        """
        ...

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        """Return the tokens of a greedy answer."""
        ...

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        """Return a float32 numpy array: [V] or [T, V]. Raises: Refused."""
        ...


def prompt(seed: int, tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt of random tokens; the special ones lie at the end and are left out."""
    rng = random.Random(seed)
    return [rng.randrange(256, vocab_size - 1000) for _ in range(tokens)]


def memory() -> dict[str, int]:
    """Return this process's memory in bytes: the peak, and now with its parts."""
    status = _kib("/proc/self/status")
    return {
        "peak_rss_bytes": status["VmHWM"],
        "rss_bytes": status["VmRSS"],
        "rss_file_bytes": status.get("RssFile", 0),
    }


def _kib(path: str) -> dict[str, int]:
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def serve(runner: Runner) -> None:
    """Answer requests on stdin until `quit`. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            return
        try:
            answer = _answer(runner, request)
        except Refused as error:
            answer = {"refused": str(error)}
        except Exception as error:  # the table must say which engine broke, and how
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")


def _answer(runner: Runner, request: dict[str, Any]) -> dict[str, Any]:
    match request.pop("op"):
        case "load":
            started_s = time.perf_counter()
            about = runner.load(Load(**request))
            loaded_s = time.perf_counter()
            runner.prefill(list(range(256, 256 + READY_TOKENS)))
            now_s = time.perf_counter()
            return {
                "load_s": loaded_s - started_s, "first_token_s": now_s - started_s, "about": about,
            }  # fmt: skip
        case "prefill":
            return {"seconds": runner.prefill(request["prompt"])}
        case "decode":
            return {"seconds": runner.decode(request["prompts"], request["steps"])}
        case "greedy":
            return {"tokens": runner.greedy(request["prompt"], request["steps"])}
        case "logits":
            import numpy

            found = runner.logits(request["prompt"], request["is_last_only"])
            numpy.save(request["path"], found)
            return {"shape": list(found.shape)}
        case "memory":
            return dict(memory())
        case other:
            raise ValueError(f"unknown request {other!r}")


def end_on_signal() -> None:
    """Let SIGTERM end this program as an exception does, so that no engine is left behind."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Failed(Exception):
    """An engine answered with an error, or ended; the message is its own."""


@dataclass(slots=True)
class Peer:
    """One running engine. `name` is the column of the table."""

    name: str
    python: Path
    script: Path
    env: dict[str, str] = field(default_factory=dict)
    log: Path | None = None
    limit_s: float = 600.0  # of one request; a process that takes longer is ended
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        stderr = self.log.open("w") if self.log else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [str(self.python), str(self.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr, text=True, env=os.environ | self.env,
        )  # fmt: skip

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait, at most `limit_s`. Raises: Failed, Refused."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise Failed(f"{self.name} is not running")
        try:
            process.stdin.write(json.dumps({"op": op} | fields) + "\n")
            process.stdin.flush()
            # An answer is one line, and the next request waits for it: nothing is left in a buffer.
            if not select.select([process.stdout], [], [], self.limit_s)[0]:
                process.kill()
                process.wait()
                raise Failed(f"{self.name} gave no answer to {op} in {self.limit_s:g} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"{self.name} ended with {process.wait()} in {op}{self._log_end()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(f"{self.name}: {answer['refused']}")
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}{self._log_end()}")
        return answer

    def load(self, load: Load) -> dict[str, Any]:
        """Start the process and load; `spawn_s` is from its start to the first token."""
        started_s = time.perf_counter()
        self.start()
        fields = {name: getattr(load, name) for name in Load.__slots__}
        answer = self.ask("load", **fields)
        return answer | {"spawn_s": time.perf_counter() - started_s}

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # the end of its input ends a runner, as `quit` does
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pause(self, signal_number: int) -> None:
        """Send SIGSTOP or SIGCONT: an engine whose turn it is not must not spin."""
        if self._process is not None:
            self._process.send_signal(signal_number)

    def _log_end(self) -> str:
        if self.log is None or not self.log.is_file():
            return ""
        lines: Sequence[str] = self.log.read_text(errors="replace").splitlines()[-5:]
        return "\n" + "\n".join(lines)
