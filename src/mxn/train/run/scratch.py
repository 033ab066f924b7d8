"""Temporary folders that name their owner, and the removal of what killed processes left behind.

A process that is killed by signal 9 removes nothing: its folders stay, and its cgroups, empty once
its ranks have ended. Whoever starts next removes both. Knows no jobs. Start at `Folder`, `sweep`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from mxn.train.run import cpu_share
from mxn.train.run.owner import FORM, Owner

log = logging.getLogger("mxn.train")

_PREFIX = "mxn-train-"
# Nothing else is ours to remove: users give folders there such names too. The end is tempfile's.
_NAME = re.compile(rf"{_PREFIX}(?:gate|profile|ranks)-({FORM})-[a-z0-9_]{{8}}")


class Folder(tempfile.TemporaryDirectory[str]):
    """A new folder only this user may read, such as ``mxn-train-gate-812.5533-x1y2z3_4``.

    It is locked as long as it is used: an owner in another container cannot be seen by its number.
    """

    def __init__(self, kind: Literal["gate", "profile", "ranks"]) -> None:
        super().__init__(prefix=f"{_PREFIX}{kind}-{Owner.me()}-")
        self._lock: int | None = lock(Path(self.name))

    def cleanup(self) -> None:
        super().cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def lock(folder: Path) -> int:
    """Say that a folder is in use until the handle returned is closed, or this process ends.

    A file system without locks gives the handle alone; `is_unused` is False there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError as error:
        log.debug("no lock on %s: %s", folder, error.strerror)
    return handle


def sweep(root: Path | None = None) -> list[Path]:
    """Remove folders and cgroups of owners that are gone, and return them.

    Those of other users, and what cannot be removed, are left.
    """
    removed = cpu_share.sweep()
    for path in (root or Path(tempfile.gettempdir())).glob(f"{_PREFIX}*"):
        if _is_left(path) and is_unused(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    if removed:
        log.info("removed what killed processes left: %s", ", ".join(map(str, removed)))
    return removed


def _is_left(path: Path) -> bool:
    owner = Owner.in_name(path.name, _NAME)
    try:
        return owner is not None and not owner.is_alive and path.lstat().st_uid == os.getuid()
    except OSError:
        return False  # another one was faster: two jobs may start behind one kill


def is_unused(path: Path) -> bool:
    """Return whether a folder is there and nobody has locked it, on any machine that sees it.

    Where the file system cannot say so, False.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False  # another one was faster, or it is no folder
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # it is in use, or the file system has no locks
    finally:
        os.close(handle)
    return True
