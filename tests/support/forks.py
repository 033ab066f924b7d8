"""The server that tests fork processes from: its imports, seconds of torch, are paid once."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import os
import subprocess
from pathlib import Path

PRELOADED = [
    "support.one_rank",
    "support.forked_ranks",
    "support.forked_commands",
    "support.forked_engines",
]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return the context whose `Process` is forked; there is one server for each test process."""
    tests = str(Path(__file__).parents[1])
    if tests not in os.environ.get("PYTHONPATH", ""):  # the server sees no other path of ours
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class ForkedProcess:
    """What is used here of `subprocess.Popen`."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Raises: TimeoutExpired when it runs on."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout_s or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
