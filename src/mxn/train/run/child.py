"""Runs a module as a process that ends when the one that started it does, however that ended.

    python -m mxn.train.run.child OWNER mxn.train.run.rank SPEC.json

Ranks, measurements, checks and probes are started so: nobody would end them after a kill -9 of
their supervisor. Asked for by name, because the parent may be gone before the first line runs here.
Knows no jobs. Start at `command`.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

from mxn.train.run.owner import Owner

_POLL_S = 1.0
_STATUS = 113  # of a process that ended because its owner did


def command(module: str, *arguments: str) -> list[str]:
    """Return what starts `module` as a process that ends with this one."""
    return [sys.executable, "-m", __name__, str(Owner.me()), module, *arguments]


def end_with(owner: Owner) -> None:
    """End this process as soon as another one has ended; returns at once."""

    def watch() -> None:
        while owner.is_alive:
            time.sleep(_POLL_S)
        print(f"process {owner.pid}, which started this one, is gone", file=sys.stderr, flush=True)
        os._exit(_STATUS)

    threading.Thread(target=watch, name="mxn-orphan", daemon=True).start()


def main(arguments: list[str]) -> None:
    owner = Owner.read(arguments[0])
    assert owner is not None, f"{arguments[0]!r} names no process"
    end_with(owner)
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
