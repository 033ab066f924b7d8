"""Who a process is: its number and when it started, as numbers come again.

What a process leaves behind (a lock, a cgroup, a temporary folder, a status file) names its owner
so; whether that one still lives is then no guess. Knows no jobs. Start at `Owner.me`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

FORM = r"\d+\.\d+"
"""How an owner is written: for patterns of names that hold one."""
_PARTS = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Owner:
    """`started`: in ticks of the kernel since boot; outside Linux in seconds since 1970."""

    pid: int
    started: int

    @classmethod
    def me(cls) -> Owner:
        return _of(os.getpid())

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """Return the owner that a text such as ``812.553301`` names; None for anything else.

        Not sought inside longer texts: a user's ``qwen-0.6b`` names nobody.
        """
        found = _PARTS.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else None

    @classmethod
    def in_name(cls, name: str, form: re.Pattern[str]) -> Owner | None:
        """Return the owner in a name of exactly this form, whose first group it is."""
        found = form.fullmatch(name)
        return cls.read(found[1]) if found else None

    def __str__(self) -> str:
        return f"{self.pid}.{self.started}"

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs; one that has ended and is not waited for does not."""
        return _started(self.pid) == self.started


@lru_cache(4)  # by number: a fork is another process
def _of(pid: int) -> Owner:
    started = _started(pid)
    assert started is not None, "this process runs"
    return Owner(pid, started)


def _started(pid: int) -> int | None:
    """Return when a process started, None when it does not run."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return _started_elsewhere(pid)
    try:
        text = stat.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _started_elsewhere(pid: int) -> int | None:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return int(process.create_time())
    except psutil.NoSuchProcess:
        return None
