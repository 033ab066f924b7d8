"""Several processes that serve on one address: started together, started again when one dies.

The parent binds the socket and only watches; each child accepts from it. Children share nothing but
the database. Start at `supervise`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

log = logging.getLogger("mxn.serve")

_LIVES_S = 5.0  # a child that dies sooner than this after its start is not started at once again
_PAUSE_S = 1.0


def supervise(work: Callable[[int], None], count: int) -> int:
    """Run `work(index)` in `count` forked processes until a signal; return the exit status.

    SIGTERM and SIGINT are passed on, and the children's ends awaited. Call it before any thread or
    event loop exists.
    """
    children: dict[int, tuple[int, float]] = {}  # pid → (index, started)
    is_ending = False

    def end(signum: int, _: object) -> None:
        nonlocal is_ending
        is_ending = True
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def start(index: int) -> None:
        pid = os.fork()
        if pid == 0:
            _child(work, index)
        children[pid] = (index, time.monotonic())

    for index in range(count):
        start(index)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while children:
        try:
            pid, status = os.wait()
        except InterruptedError:
            continue
        if pid not in children:
            continue
        index, started_s = children.pop(pid)
        if is_ending:
            continue
        log.error("worker %d (pid %d) ended with %d; starting it again", index, pid, status)
        if time.monotonic() - started_s < _LIVES_S:
            time.sleep(_PAUSE_S)
        if not is_ending:
            start(index)
    return 0


def _child(work: Callable[[int], None], index: int) -> None:
    """Run the work and end the process, whatever happens; nothing of the parent's runs after it."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(index)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        log.exception("worker %d failed", index)
    finally:
        os._exit(status)
