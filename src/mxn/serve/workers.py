"""Several processes that serve on one address: started together, started again when one dies.

The parent binds the socket and only watches; each child accepts from it. Children share nothing but
the database, and end as on SIGTERM when their parent is gone. Start at `supervise`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

log = logging.getLogger("mxn.serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LIVES_S = 5.0  # a child that dies sooner than this after its start is not started at once again
_PAUSE_S = 1.0


def supervise(
    work: Callable[[int], None], count: int, on_end: Callable[[], None] = lambda: None
) -> int:
    """Run `work(index)` in `count` forked processes until a signal; return the exit status.

    SIGTERM and SIGINT are passed on, and the children's ends awaited. `on_end` is called at the
    first of them: the place to close what the parent holds open, such as a listening socket. Call
    it before any thread or event loop exists.
    """
    children: dict[int, tuple[int, float]] = {}  # pid → (index, started)
    is_ending = False
    life, hold = os.pipe()  # nobody writes: it ends when the parent does

    def end(signum: int, _: object) -> None:
        nonlocal is_ending
        if not is_ending:
            on_end()
        is_ending = True
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def start(index: int) -> None:
        # A signal between the fork and the note of its pid would miss the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if not is_ending:
            pid = os.fork()
            if pid == 0:
                os.close(hold)
                _child(work, index, life)
            children[pid] = (index, time.monotonic())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    for number in _SIGNALS:
        signal.signal(number, end)
    for index in range(count):
        start(index)
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
        start(index)
    return 0


def _end_with_parent(life: int) -> None:
    os.read(life, 1)
    log.warning("the process that started this worker is gone; ending")
    os.kill(os.getpid(), signal.SIGTERM)


def _child(work: Callable[[int], None], index: int, life: int) -> None:
    """Run the work and end the process, whatever happens; nothing of the parent's runs after it."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone, which passes it on once
        threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
        work(index)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        log.exception("worker %d failed", index)
    finally:
        os._exit(status)
