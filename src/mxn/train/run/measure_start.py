"""Starts the processes of a measurement as the job starts its ranks, and collects what they found.

Knows no profiles. Start at `ask_ranks`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mxn.errors import ChipError
from mxn.train.run import child, scratch
from mxn.train.run.cpu_share import CpuShare
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.launch import cores_of, log_path, start_process, tail_of
from mxn.train.run.measured import MODEL_FILE, Answer, Model, Request

_LONGEST_S = 3600.0


def ask_ranks(job: Job, request: Request, model: Model) -> list[Answer]:
    """Run one process for each member of `request` and return their answers, by rank.

    Raises: ChipError with the end of its log for a process that failed; UnsupportedError where
    this machine limits no CPU shares.
    """
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    with scratch.Folder("profile") as name:
        folder = Path(name)
        (folder / "request.json").write_text(request.to_json())
        (folder / MODEL_FILE).write_bytes(pickle.dumps(model))
        processes: list[subprocess.Popen[bytes]] = []
        shares: dict[int, CpuShare] = {}
        try:
            groups = [job.group(member.group) for member in request.members]
            for member, group, cores in zip(request.members, groups, cores_of(groups), strict=True):
                if group.cpu_share is not None:
                    name = f"measure-{member.rank}"
                    shares[member.rank] = CpuShare.create(group.cpu_share, name)
                processes.append(_start(member.rank, group, folder, address))
                if cores is not None:
                    os.sched_setaffinity(processes[-1].pid, cores)
            _wait(processes, request, folder, lambda: _are_ready(folder, len(processes)))
            for rank, share in shares.items():
                share.take_in(processes[rank].pid)
            (folder / "go").touch()
            _wait(processes, request, folder)
        finally:
            _end(processes, shares.values())
        answers = [
            Answer.from_json((folder / f"answer-{rank}.json").read_text())
            for rank in range(len(processes))
        ]
    del store  # the ranks met there: it had to live as long as they
    return answers


def _start(rank: int, group: DeviceSettings, folder: Path, address: str) -> subprocess.Popen[bytes]:
    request = str(folder / "request.json")
    command = child.command("mxn.train.run.measure_rank", request, str(rank), address)
    return start_process(command, log_path(folder, rank), group)


def _are_ready(folder: Path, num_ranks: int) -> bool:
    return all((folder / f"ready-{rank}").exists() for rank in range(num_ranks))


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    request: Request,
    folder: Path,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Wait for all to end well, or for `is_over`. Raises: ChipError for the first that fails."""
    longest_s = _LONGEST_S + request.seconds
    deadline_s = time.monotonic() + longest_s
    while any(process.poll() is None for process in processes):
        _check(processes, request, folder)
        if is_over():
            return
        if time.monotonic() > deadline_s:
            raise ChipError(f"no measurement in {longest_s:g} s", device=request.members[0].device)
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


def _end(processes: Sequence[subprocess.Popen[bytes]], shares: Iterable[CpuShare]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for share in shares:
        share.remove()
