"""Reading a checkpoint of a job that runs, and removing one that somebody may read.

A reader holds a shared lock on the manifest; who removes a checkpoint needs that lock alone, and
leaves it for the next time otherwise. The kernel lets it go when a reader ends, however it ends.
Start at `with_checkpoint`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mxn.errors import NotFoundError
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.checkpoint.files import sync_folder
from mxn.train.run.checkpoint.manifest import BrokenError
from mxn.train.run.checkpoint.stored import Stored

log = logging.getLogger("mxn.train")

_TRIES = 5

T = TypeVar("T")


def with_checkpoint(folder: Path, step: int | None, use: Callable[[Stored], T]) -> T:
    """Call `use` with the checkpoint of `step` (None: the newest), which stays until it returns.

    One that was removed or replaced all the same is tried again, with the newest of then.
    Raises: NotFoundError where there is none; BrokenError for one that was altered.
    """
    for _ in range(_TRIES):
        path = choose(folder, step)
        try:
            with _pinned(path):
                return use(Stored.open(path))
        except _Gone:
            log.warning("%s was removed by the running job; looking for the next", path.name)
    raise NotFoundError(
        f"checkpoints in {folder} are removed faster than they can be read",
        hint="keep more of them: checkpoint: {keep: …}",
    )


def choose(folder: Path, step: int | None) -> Path:
    """Return the folder of a checkpoint, None: of the newest. Raises: NotFoundError."""
    found = dict(manifests.complete(folder))
    if not found:
        raise NotFoundError(
            f"there is no checkpoint in {folder}", hint="run the job first: `mxn train run`"
        )
    if step is None:
        return found[max(found)]
    if step not in found:
        raise NotFoundError(
            f"no checkpoint of step {step}",
            hint=f"there are: {', '.join(map(str, found))}; a running job removes its oldest",
        )
    return found[step]


def remove(folder: Path) -> bool:
    """Remove a checkpoint unless somebody reads it; the manifest goes first: half of one is none.

    Returns whether it is gone.
    """
    manifest = folder / manifests.NAME
    if manifest.is_file():
        with manifest.open("r+b") as file:
            if not _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            manifest.unlink()
            sync_folder(folder)
    shutil.rmtree(folder)
    return True


class _Gone(Exception):
    """The checkpoint is not under its name any more."""


@contextmanager
def _pinned(path: Path) -> Iterator[None]:
    manifest = path / manifests.NAME
    try:
        file = manifest.open("rb")
    except FileNotFoundError:
        raise _Gone from None
    with file:
        _lock(file.fileno(), fcntl.LOCK_SH)

        def is_here() -> bool:
            try:
                return os.path.samestat(manifest.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                return False

        if not is_here():
            raise _Gone
        try:
            yield
        except (BrokenError, FileNotFoundError) as error:
            if is_here():
                raise
            raise _Gone from error


def _lock(handle: int, how: int) -> bool:
    """Return False where another one has it; a file system without locks counts as free."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no lock: %s", os.strerror(error.errno or 0))
    return True
