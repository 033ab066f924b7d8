"""A folder that one process at a time may work in: a lock that says who holds it.

The kernel lets the lock go when its holder ends, however it ends. Knows no jobs. Start at `hold`.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxn.errors import UserError
from mxn.train.run.owner import Owner

log = logging.getLogger("mxn.train")

_NAME = ".lock"


@contextmanager
def hold(folder: Path, what: str, job: str, out: str, *, hint: str) -> Iterator[None]:
    """Be the only one at work in `folder`, which is made if it is not there.

    `what`: of the folder, for the error; `job` and `out` are told to whoever comes next.
    A file system without locks is said and gone on with: nobody can tell there.
    Raises: UserError naming the holder where another one is at work, or for no right to write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Opened without cutting it: until the lock is ours, it says who has it.
        file = (folder / _NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}, {what}, cannot be used: {error.strerror}", hint=hint) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another `mxn train run` is at work in {folder}, {what}: {_told(file.read())}",
                hint=hint,
            ) from None
        except OSError as error:  # such as clusters' disks that are mounted without locks
            log.warning(
                "%s, %s, cannot be locked (%s): nothing keeps a second job out of it",
                folder, what, error.strerror,
            )  # fmt: skip
        file.truncate(0)
        file.write(json.dumps({"pid": Owner.me().pid, "job": job, "out": out}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # nobody holds it from here on


def _told(text: str) -> str:
    try:
        told = json.loads(text)
        return f"process {told['pid']}, job {told['job']!r} with out {told['out']}"
    except (ValueError, KeyError, TypeError):
        return "it has not yet said who it is"
