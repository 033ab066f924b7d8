"""What a supervisor reads from a job's folder, and the locks that it works under. No decisions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mxn.train.run.held import hold
from mxn.train.run.job import Job, metrics_path


@contextmanager
def held_folders(job: Job) -> Iterator[None]:
    """Be the only one at work in the job's folder and in that of its checkpoints.

    The latter may lie elsewhere and be named by another job too, which would remove ours as old.
    Raises: UserError naming the process and the job that is at work there, or for a folder that
    cannot be used.
    """
    out, checkpoints = Path(job.out), Path(job.checkpoint.folder)
    wait = "wait for it, stop it, or give another"
    with ExitStack() as locks:
        of_job = hold(out, "the folder of the job", job.name, job.out, hint=f"{wait} `out`")
        locks.enter_context(of_job)
        if not (os.path.exists(checkpoints) and checkpoints.samefile(out)):
            what, hint = "the folder of the checkpoints", f"{wait} checkpoint: {{folder: …}}"
            locks.enter_context(hold(checkpoints, what, job.name, job.out, hint=hint))
        yield


def last_launch(out: Path) -> int:
    """Return the number of the last launch in a job's folder, 0 before the first.

    Numbers go on over runs of the command: files of an earlier launch (it was asked to pause, it
    had finished) and ranks that have just lost their supervisor must not be taken for the next's.
    """
    paths = (*out.glob("log/launch-*"), *out.glob("control/*-*"))  # logs may have been removed
    numbers = (path.name.split("-")[1] for path in paths)
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def last_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of a JSONL file, read from its end."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        begin, lines = file.seek(0, 2), [b""]
        while len(lines) < 3 and begin > 0:  # a line of a job of many ranks is long
            begin = max(0, begin - 65536)
            file.seek(begin)
            lines = file.read().split(b"\n")
    return json.loads(lines[-2]) if len(lines) > 1 else {}


class SignsOfLife:
    """How long a launch has been silent: neither its metrics nor a log of a rank changes."""

    def __init__(self, job: Job, launch: int) -> None:
        self._metrics = metrics_path(job)
        self._logs = Path(job.out) / "log" / f"launch-{launch}"
        self._changed, self._seen_s = 0.0, time.monotonic()

    def silent_s(self) -> float:
        """Return the seconds since a change was first seen, by this machine's own clock."""
        paths = [self._metrics, *self._logs.glob("*")]
        changed = max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)
        if changed != self._changed:
            self._changed, self._seen_s = changed, time.monotonic()
        return time.monotonic() - self._seen_s
