"""Starts the ranks of a plan on this machine, one process each, and sees how they end.

Each rank has its device, threads, CPU share if it has one, and a log file. Knows processes and
files; knows no tensors. What ranks are told is a `RankSpec` file; what becomes of them the
supervisor decides. Start at `launch`. `launch_ray.py` does the same over the machines of a Ray
cluster.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxn.errors import UserError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run import child, scratch
from mxn.train.run.cores import Wish, assign
from mxn.train.run.cpu_share import CpuShare
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.placement import Placement
from mxn.train.run.supervise.ranks import Death, Launching

log = logging.getLogger("mxn.train")

_TAIL_LINES = 8
_KILL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """All that a rank process is told."""

    rank: int
    group: str
    device: str  # "cuda:1"
    island: str | None  # None: what its collective backend holds
    store: str  # address of the store where ranks meet
    launch: int
    resume_step: int | None
    job: str  # JSON
    plan: str  # JSON

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankSpec:
        return cls(**json.loads(text))


class LocalRanks:
    """The processes of one launch. Implements `supervise.ranks.Ranks`."""

    def __init__(self, specs: list[RankSpec], logs: Path, store: Any) -> None:
        self.logs = logs
        self._specs, self._store = specs, store  # the store lives as long as the ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        self._shares: list[CpuShare] = []
        self._folder = scratch.Folder("ranks")

    def start(self, job: Job) -> None:
        """Start all of them. Raises: UnsupportedError, CapacityError for CPU shares or cores."""
        try:
            groups = [job.group(spec.group) for spec in self._specs]
            for spec, group, cores in zip(self._specs, groups, cores_of(groups), strict=True):
                self._start(spec, group, cores)
        except BaseException:
            self.kill()
            raise

    def deaths(self) -> list[Death]:
        """Return the ranks that ended badly, without their words: the supervisor has those."""
        return [
            Death(rank=spec.rank, group=spec.group, code=code)
            for spec, process in zip(self._specs, self._processes, strict=True)
            if (code := process.poll()) not in (None, 0)
        ]

    def have_ended(self) -> bool:
        if any(process.poll() is None for process in self._processes):
            return False
        self._clean()
        return True

    def pids(self) -> list[int]:
        """Return the process ids by rank."""
        return [process.pid for process in self._processes]

    def cpu_s(self) -> list[float]:
        """Return the CPU seconds used so far by each rank that has a CPU share, in rank order."""
        return [share.used_s() for share in self._shares]

    def tail(self, rank: int) -> str:
        """Return the end of a rank's log."""
        return tail_of(log_path(self.logs, rank))

    def wait(self, timeout_s: float) -> None:
        """Wait until all ranks ended. Raises: UserError with the log of the first that failed."""
        deadline_s = time.monotonic() + timeout_s
        while not self.have_ended():
            if deaths := self.deaths():
                first = min(deaths, key=lambda death: (death.code >= 0, death.rank))
                time.sleep(0.2)  # for its log to be whole
                text = self.tail(first.rank)
                self.kill()
                raise UserError(
                    f"rank {first.rank} (group {first.group!r}) ended with status {first.code}; "
                    f"the end of its log:\n{text}"
                )
            if time.monotonic() > deadline_s:
                self.kill()
                raise UserError(f"the ranks did not end in {timeout_s:g} s")
            time.sleep(0.05)
        if deaths := self.deaths():
            first = deaths[0]
            raise UserError(
                f"rank {first.rank} (group {first.group!r}) ended with status {first.code}; "
                f"the end of its log:\n{self.tail(first.rank)}"
            )

    def interrupt(self) -> None:
        """Ask all ranks to end as ctrl-c does."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End all ranks at once, and return when they are gone."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait(_KILL_S)
        self._clean()

    def _start(self, spec: RankSpec, group: DeviceSettings, cores: frozenset[int] | None) -> None:
        path = Path(self._folder.name) / f"rank-{spec.rank}.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        share = None
        if group.cpu_share is not None:
            share = CpuShare.create(group.cpu_share, f"rank-{spec.rank}")
            self._shares.append(share)
        process = start_process(rank_command(path), log_path(self.logs, spec.rank), group)
        self._processes.append(process)
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)  # before it has threads: they inherit it
        if share is not None:
            share.take_in(process.pid)

    def _clean(self) -> None:
        for share in self._shares:
            share.remove()
        self._shares = []
        self._folder.cleanup()


def launch(launching: Launching) -> LocalRanks:
    """Start the ranks of a plan on this machine.

    Raises: UserError for a plan that names devices the job does not have; UnsupportedError for one
    that cannot be run or limited here.
    """
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    specs = rank_specs(launching, address)
    launching.log_folder.mkdir(parents=True, exist_ok=True)
    ranks = LocalRanks(specs, launching.log_folder, store)
    ranks.start(launching.job)
    return ranks


def rank_specs(launching: Launching, store_address: str) -> list[RankSpec]:
    """Return what each rank is told. Raises: UserError, UnsupportedError as `launch`."""
    job, plan = launching.job, launching.plan
    placement = Placement(plan)
    told_job, told_plan = job.to_json(), plan.to_json()
    is_emulated = any(group.link_bytes_per_s is not None for group in job.devices)
    specs = []
    for place in placement.places:
        stage = placement.stage_of(place.rank)
        specs.append(
            RankSpec(
                rank=place.rank,
                group=stage.group,
                device=device_of(job, stage.group, stage.first_device + place.index),
                # A limited link is one between makers, also where one backend could hold both.
                island=stage.group if is_emulated else None,
                store=store_address,
                launch=launching.launch,
                resume_step=launching.resume_step,
                job=told_job,
                plan=told_plan,
            )
        )
    return specs


def device_of(job: Job, group: str, number: int) -> str:
    """Return the device string of the `number`-th device of a group.

    Raises: UserError when the group has fewer.
    """
    found = job.group(group)
    if number >= found.count:
        raise UserError(
            f"the plan uses device {number} of group {group!r}, which has {found.count}",
            hint="plan again, or raise its count",
        )
    kind, _, first = found.device.partition(":")
    if kind == "cpu":  # one processor, many processes
        return "cpu"
    return f"{kind}:{int(first or 0) + number}"


def cores_of(groups: Sequence[DeviceSettings]) -> list[frozenset[int] | None]:
    """Return the cores of each rank, whose group stands at its place; None: any.

    Raises: CapacityError when ranks that want cores of their own do not fit on this machine.
    """
    wishes = [
        Wish(threads=group.threads, share=group.cpu_share or 1.0) if group.pin else None
        for group in groups
    ]
    if not any(wishes):
        return [None] * len(wishes)
    return assign(wishes, sorted(os.sched_getaffinity(0)))


def start_process(
    command: list[str], log_file: Path, group: DeviceSettings, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process as a rank of `group`: its threads, its output in a file, no terminal.

    It is in a process group of its own: ctrl-c reaches the supervisor, which asks the ranks to end.
    """
    threads = str(group.threads)
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with log_file.open("ab") as out:
        return subprocess.Popen(
            command,
            env=variables | dict(more or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def rank_command(spec_file: Path) -> list[str]:
    return child.command("mxn.train.run.rank", str(spec_file))


def log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def tail_of(path: Path, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a file, indented; a word where there is none."""
    if not path.is_file():
        return "  (no log)"
    said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in said[-lines:]) or "  (it printed nothing)"


def launching_of(
    job: Job, plan: TrainPlan, *, launch: int = 0, resume_step: int | None = None
) -> Launching:
    """Return a launch with its log in the job's folder, as the supervisor makes them."""
    folder = Path(job.out) / "log" / f"launch-{launch}"
    return Launching(job=job, plan=plan, launch=launch, resume_step=resume_step, log_folder=folder)
