"""A process's share of the processor, by cgroup quota: version 1 and version 2. Linux only.

A share is of one core: 0.25 means a quarter of a core's time, 2 means two cores. Shares emulate
slower chips on one machine; what is measured with them has the basis `simulated`. Knows no ranks.
Start at `CpuShare.create`.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from mxn.errors import CapacityError, UnsupportedError
from mxn.train.run.owner import FORM, Owner

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 20_000
"""Short against a micro-batch, so that a stage is slow evenly rather than in jerks."""
_LEAST_QUOTA_US = 1_000  # the kernel takes no less
_REMOVE_S = 5.0
_YOUNG_S = 60.0
_number = itertools.count()
_NAME = re.compile(rf"mxn-({FORM})-\d+-.+")


@dataclass(frozen=True, slots=True)
class CpuShare:
    """A cgroup with a quota. `remove` it once its processes are gone."""

    folder: Path
    share: float

    @classmethod
    def create(cls, share: float, name: str, *, root: Path = ROOT) -> CpuShare:
        """Make a cgroup that may use `share` of a core.

        Raises: UnsupportedError saying what is missing where this process cannot make one;
        CapacityError for a share below what the kernel takes or above what the machine has.
        """
        quota_us = round(share * PERIOD_US)
        cores = os.cpu_count() or 1
        if quota_us < _LEAST_QUOTA_US or share > cores:
            raise CapacityError(
                f"a CPU share must be {_LEAST_QUOTA_US / PERIOD_US:g} to {cores} cores of this "
                f"machine, got {share!r}"
            )
        parent, is_second = _parent(root)
        folder = parent / f"mxn-{Owner.me()}-{next(_number)}-{name}"
        try:
            if is_second:
                _allow_cpu(parent)
            folder.mkdir()
        except OSError as error:
            raise _cannot(parent, error) from error
        made = cls(folder, share)
        try:
            if is_second:
                (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        except OSError as error:
            made.remove()
            raise _cannot(folder, error) from error
        return made

    def take_in(self, pid: int) -> None:
        """Move a process, with all its threads, into the cgroup. Raises: UnsupportedError."""
        try:
            (self.folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise _cannot(self.folder, error) from error

    def used_s(self) -> float:
        """Return the CPU seconds used so far in it; 0 where the kernel does not tell."""
        first, second = self.folder / "cpuacct.usage", self.folder / "cpu.stat"
        if first.is_file():
            return int(first.read_text()) / 1e9
        for line in second.read_text().splitlines():
            if line.startswith("usage_usec "):
                return int(line.split()[1]) / 1e6
        return 0.0

    def remove(self) -> None:
        """Remove the cgroup. A process that is just ending keeps it busy a moment longer."""
        deadline_s = time.monotonic() + _REMOVE_S
        while self.folder.exists():
            try:
                self.folder.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise _cannot(self.folder, error) from error
                time.sleep(0.01)


def sweep(root: Path = ROOT, *, older_s: float = _YOUNG_S) -> list[Path]:
    """Remove empty cgroups of processes that are gone, and return them.

    Younger ones are left: their owner may be in another container, which cannot be seen from here.
    """
    try:
        parent, _ = _parent(root)
    except UnsupportedError:
        return []
    removed: list[Path] = []
    for folder in parent.glob("mxn-*"):
        owner = Owner.in_name(folder.name, _NAME)
        try:
            if owner is None or owner.is_alive or _age_s(folder) < older_s:
                continue
            folder.rmdir()
        except OSError:
            continue  # it holds processes, is another user's, or another one was faster
        removed.append(folder)
    return removed


def _age_s(folder: Path) -> float:
    return time.time() - folder.stat().st_ctime


def why_not(root: Path = ROOT) -> str | None:
    """Return why this process cannot limit CPU shares, None when it can."""
    try:
        CpuShare.create(1.0, "probe", root=root).remove()
    except UnsupportedError as error:
        return error.message
    return None


def _parent(root: Path) -> tuple[Path, bool]:
    """Return the cgroup to make ours in, and whether it is of version 2.

    Raises: UnsupportedError.
    """
    try:
        return _found_parent(root)
    except OSError as error:
        raise _cannot(root, error) from error


def _found_parent(root: Path) -> tuple[Path, bool]:
    for name in ("cpu", "cpu,cpuacct"):
        first = root / name
        if (first / "cpu.cfs_quota_us").is_file() or (first / "cgroup.procs").is_file():
            return first, False
    controllers = root / "cgroup.controllers"
    if controllers.is_file():
        own = _own_group(root)
        if "cpu" in (own / "cgroup.controllers").read_text().split():
            return own, True
    raise UnsupportedError(
        f"this machine has no cgroup with the cpu controller under {root}",
        hint="run without cpu_share, or mount cgroups (v1: cpu, v2 with cpu delegated)",
    )


def _own_group(root: Path) -> Path:
    """Return the v2 cgroup above this process's own: a group with processes has no children."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            own = root / line[3:].strip("/")
            return own.parent if own != root and own.is_dir() else root
    return root


def _allow_cpu(parent: Path) -> None:
    control = parent / "cgroup.subtree_control"
    if "cpu" not in control.read_text().split():
        control.write_text("+cpu")


def _cannot(place: Path, error: OSError) -> UnsupportedError:
    return UnsupportedError(
        f"cannot limit a rank's CPU share: {place}: {error.strerror}",
        hint="run as root or delegate the cpu controller to this user; or leave cpu_share out",
    )
