"""What processes hold, over time: memory, file descriptors, threads; and what that says of leaks.

Reads /proc, so Linux only. Knows no requests and no gateway. Start at `sample` and `growth`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One process and its children together; memory in KiB."""

    rss_kib: int
    pss_kib: int
    num_sockets: int
    num_files: int  # all other descriptors
    num_threads: int


def sample(pid: int) -> Held:
    """Return what a process and all below it hold now. Raises: OSError when it is gone."""
    found = [_one(member) for member in family(pid)]
    return Held(
        rss_kib=sum(item.rss_kib for item in found),
        pss_kib=sum(item.pss_kib for item in found),
        num_sockets=sum(item.num_sockets for item in found),
        num_files=sum(item.num_files for item in found),
        num_threads=sum(item.num_threads for item in found),
    )


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    members = [pid]
    for member in members:  # grows while we go
        for task in Path(f"/proc/{member}/task").iterdir():
            members += map(int, (task / "children").read_text().split())
    return members


def _one(pid: int) -> Held:
    status = _fields(Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = [_target(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    num_sockets = sum(target.startswith("socket:") for target in fds)
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return Held(
        rss_kib=status["VmRSS"],
        pss_kib=rollup["Pss"],
        num_sockets=num_sockets,
        num_files=len(fds) - num_sockets,
        num_threads=status["Threads"],
    )


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""  # closed since the folder was listed


def _fields(lines: Iterable[str]) -> dict[str, int]:
    pairs = (line.partition(":") for line in lines)
    values = ((name, rest.split()) for name, _, rest in pairs)
    return {name: int(words[0]) for name, words in values if words and words[0].isdigit()}


def growth(at: Sequence[float], values: Sequence[float], skipped: float = 1 / 3) -> float:
    """Return the slope of a straight line through the points, per unit of `at`.

    The first part, as far as `skipped` of the way from the first to the last `at`, is warming up
    and not looked at. Raises: ValueError for less than 3 points after it.
    """
    begin = at[0] + skipped * (at[-1] - at[0])
    points = [(x, y) for x, y in zip(at, values, strict=True) if x >= begin]
    if len(points) < 3:
        raise ValueError(f"{len(points)} points of {len(at)} are too few: sample more often")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
