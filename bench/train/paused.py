"""A job that runs only while it is let: so several are measured in turns, each many times.

On a machine whose speed changes by the minute, two jobs compare only if their steps lie close to
each other, and a start takes longer than the steps that are wanted of it. So all jobs are started
once, and all of their processes but those of one are stopped (SIGSTOP). Start at `PausedJob`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_POLL_S = 0.01
_END_S = 60.0

_MAIN = """
import os, sys
cores = sys.argv.pop(1)
if cores:
    os.sched_setaffinity(0, {int(cores)})
from mxn.cli.main import main
main()
"""


@dataclass(frozen=True, slots=True)
class Window:
    """What was done while a job was let run: whole steps, and the time that they took."""

    steps: int
    seconds: float
    rows: list[dict[str, Any]]  # of metrics.jsonl; times in the first one have the stop in them

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


class PausedJob:
    """`mxn train run` of a job file, stopped whenever nobody waits for its steps."""

    def __init__(self, job: Path, out: Path, *, core: int | None = None) -> None:
        """`core`: for a job of one rank that asks for a core of its own."""
        self.out = out
        self._log = job.with_suffix(".log")
        command = [sys.executable, "-c", _MAIN, "" if core is None else str(core)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "train", "run", str(job)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._seen = 0  # bytes of metrics.jsonl
        self._rows: list[dict[str, Any]] = []
        self._since_s = time.perf_counter()

    def free(self) -> None:
        """Let the launching process use all cores again; its rank stays where it is."""
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), os.sched_getaffinity(0))

    @property
    def num_steps(self) -> int:
        return len(self._rows)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self._since_s = time.perf_counter()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def window(self, seconds: float, steps: int) -> Window:
        """Let it run for whole steps: so many seconds and steps at least.

        It begins and ends at the end of a step, as far as a file tells it in time: what is late
        at the end of one window is the head start of the next.
        """
        self.resume()
        first = self.num_steps
        while self.num_steps < first + steps or time.perf_counter() - self._since_s < seconds:
            self.wait_for_step()
        return self.close(first)

    def close(self, first: int) -> Window:
        """Pause at the end of a step; return the steps since `first`."""
        seconds = time.perf_counter() - self._since_s
        self.pause()
        rows = self._rows[first:]
        return Window(len(rows), seconds, rows)

    def wait_for(self, num_steps: int) -> None:
        """Wait until so many steps are done. Raises: SystemExit when the job ends before."""
        while self.num_steps < num_steps:
            self.wait_for_step()

    def wait_for_step(self) -> None:
        before = self.num_steps
        while self.look() == before:
            time.sleep(_POLL_S)

    def look(self) -> int:
        """Read what steps say that are done; return their number. Raises: SystemExit."""
        path = self.out / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size > self._seen:
            with path.open("rb") as file:
                file.seek(self._seen)
                told = file.read(size - self._seen)
            whole = told.rpartition(b"\n")[0]
            if whole:
                self._seen += len(whole) + 1
                self._rows += map(json.loads, whole.splitlines())
        elif self._process.poll() is not None:
            raise SystemExit(f"a job ended with {self._process.returncode}:\n{self._told()}")
        return self.num_steps

    def end(self) -> None:
        """Stop the job for good, as ctrl-c does; what does not listen is killed."""
        if self._process.poll() is not None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            for process in self._tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(_END_S)

    def _told(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _signal(self, number: int) -> None:
        signal_tree(self._process.pid, number)

    def _tree(self) -> list[psutil.Process]:
        return tree_of(self._process.pid)


def tree_of(pid: int) -> list[psutil.Process]:
    """Return a process and those it started, itself first."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_tree(pid: int, number: int) -> None:
    """Send a signal to a process, first, as stopped it starts no more, and to all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    for process in tree_of(pid)[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def together(jobs: Sequence[PausedJob], steps_s: Sequence[float], seconds: float) -> list[Window]:
    """Let several jobs run at the same time, each for whole steps; return a window of each.

    It ends with a step of the slowest (by `steps_s`) after `seconds`; the others finish the step
    that they are in.
    """
    firsts = [job.num_steps for job in jobs]
    slowest = max(range(len(jobs)), key=lambda number: steps_s[number])
    for job in jobs:
        job.resume()
    last = jobs[slowest]
    windows: dict[int, Window] = {}
    begun_s = time.perf_counter()
    for _ in _boundaries(last):
        if last.num_steps >= firsts[slowest] + 2 and time.perf_counter() - begun_s >= seconds:
            break
        for job in jobs:
            job.look()
    windows[slowest] = last.close(firsts[slowest])
    counts = {number: job.look() for number, job in enumerate(jobs) if number != slowest}
    while counts:
        for number in [n for n, count in counts.items() if jobs[n].look() > count]:
            windows[number] = jobs[number].close(firsts[number])
            del counts[number]
        time.sleep(_POLL_S)
    return [windows[number] for number in range(len(jobs))]


def _boundaries(job: PausedJob) -> Iterator[int]:
    while True:
        job.wait_for_step()
        yield job.num_steps
