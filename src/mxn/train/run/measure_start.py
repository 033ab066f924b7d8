"""Starts the processes of a measurement as the job starts its ranks, and collects what they found.

Knows no profiles. Start at `ask_ranks`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mxn.errors import ChipError
from mxn.train.run.cpu_share import CpuShare
from mxn.train.run.job import Job
from mxn.train.run.launch import log_path, start_process, tail_of
from mxn.train.run.measured import Answer, Request

_LONGEST_S = 3600.0


def ask_ranks(job: Job, request: Request) -> list[Answer]:
    """Run one process for each member of `request` and return their answers, by rank.

    Raises: ChipError with the end of its log for a process that failed; UnsupportedError where
    this machine limits no CPU shares.
    """
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    with tempfile.TemporaryDirectory(prefix="mxn-profile-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(request.to_json())
        processes: list[subprocess.Popen[bytes]] = []
        shares: list[CpuShare] = []
        try:
            for member in request.members:
                _start(job, member.rank, member.group, folder, address, processes, shares)
            _wait(processes, request, folder)
        finally:
            _end(processes, shares)
        answers = [
            Answer.from_json((folder / f"answer-{rank}.json").read_text())
            for rank in range(len(processes))
        ]
    del store  # the ranks met there: it had to live as long as they
    return answers


def _start(
    job: Job,
    rank: int,
    group_name: str,
    folder: Path,
    address: str,
    processes: list[subprocess.Popen[bytes]],
    shares: list[CpuShare],
) -> None:
    group = job.group(group_name)
    if group.cpu_share is not None:
        shares.append(CpuShare.create(group.cpu_share, f"measure-{rank}"))
    request = str(folder / "request.json")
    command = [sys.executable, "-m", "mxn.train.run.measure_rank", request, str(rank), address]
    processes.append(start_process(command, log_path(folder, rank), group))
    if group.cpu_share is not None:
        shares[-1].take_in(processes[-1].pid)


def _wait(processes: Sequence[subprocess.Popen[bytes]], request: Request, folder: Path) -> None:
    """Wait for all to end well. Raises: ChipError for the first that does not."""
    deadline_s = time.monotonic() + _LONGEST_S
    while any(process.poll() is None for process in processes):
        _check(processes, request, folder)
        if time.monotonic() > deadline_s:
            raise ChipError(f"no measurement in {_LONGEST_S:g} s", device=request.members[0].device)
        time.sleep(0.05)
    _check(processes, request, folder)


def _check(processes: Sequence[subprocess.Popen[bytes]], request: Request, folder: Path) -> None:
    """Name the one that was killed before those that only lost it."""
    failed = [(p.returncode > 0, rank) for rank, p in enumerate(processes) if p.poll()]
    if not failed:
        return
    rank = min(failed)[1]
    status, device = processes[rank].returncode, request.members[rank].device
    said = tail_of(log_path(folder, rank))
    raise ChipError(
        f"the measurement on {device} failed with status {status}; the end of its log:\n{said}",
        device=device,
    )


def _end(processes: Sequence[subprocess.Popen[bytes]], shares: Sequence[CpuShare]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for share in shares:
        share.remove()
