"""Starts the processes of a measurement and collects what they found. Start at `ask_ranks`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mxn.chips.registry import chip_of
from mxn.errors import ChipError, UnsupportedError
from mxn.train.run.job import Job
from mxn.train.run.measured import Answer, Request

if TYPE_CHECKING:
    from mxn.chips.chip import Device

_LONGEST_S = 3600.0


def ask_ranks(job: Job, request: Request, devices: Mapping[int, Device]) -> list[Answer]:
    """Run one process for each member of `request` and return their answers, by rank.

    Raises: ChipError with the end of its log for a process that failed.
    """
    from mxn.train.run.bridge import serve_store

    if any(job.group(member.group).cpu_share is not None for member in request.members):
        raise UnsupportedError("cpu_share is not provided yet")
    store, address = serve_store()
    with tempfile.TemporaryDirectory(prefix="mxn-profile-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(request.to_json())
        processes = [
            _start(folder, member.rank, address, devices[member.rank], job.group(member.group))
            for member in request.members
        ]
        try:
            _wait(processes, folder, devices)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        answers = [
            Answer.from_json((folder / f"answer-{rank}.json").read_text())
            for rank in range(len(processes))
        ]
    del store
    return answers


def _start(
    folder: Path, rank: int, address: str, device: Device, group: object
) -> subprocess.Popen[bytes]:
    threads = str(getattr(group, "threads", 1))
    variables = {**os.environ, **chip_of(device.vendor).environment, "OMP_NUM_THREADS": threads}
    with (folder / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mxn.train.run.measure_rank",
             str(folder / "request.json"), str(rank), address],
            env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], folder: Path, devices: Mapping[int, Device]
) -> None:
    """Wait for all to end well. Raises: ChipError for the first that does not."""
    deadline = time.monotonic() + _LONGEST_S
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll() not in (None, 0):
                raise _failed(rank, f"exit status {process.returncode}", folder, devices)
        if time.monotonic() > deadline:
            raise _failed(0, f"no answer in {_LONGEST_S:g} s", folder, devices)
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.returncode:
            raise _failed(rank, f"exit status {process.returncode}", folder, devices)


def _failed(rank: int, how: str, folder: Path, devices: Mapping[int, Device]) -> ChipError:
    lines = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
    said = "\n  ".join(lines[-8:]) or "nothing"
    device = devices[rank].id
    return ChipError(
        f"the measurement on {device} failed ({how}); it said:\n  {said}", device=device
    )
