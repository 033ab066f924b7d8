"""Ctrl-c and SIGTERM as something to be asked for, instead of something that strikes anywhere.

Knows no jobs. Start at `Interrupts`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Counts them while `heard`; inside `leaving_at_once` they raise KeyboardInterrupt."""

    def __init__(self) -> None:
        self._count = 0
        self._is_busy = False  # in a call that may last minutes, with no rank running

    def take(self) -> bool:
        """Return whether there was one that nobody took yet, and take it."""
        if not self._count:
            return False
        self._count -= 1
        return True

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Raise KeyboardInterrupt for one that comes inside, or came just before."""
        self._is_busy = True
        try:
            if self._count:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_busy = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Catch them; in the main thread only, as no other gets any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, frame: Any) -> None:
            self._count += 1
            if self._is_busy:
                raise KeyboardInterrupt

        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, hear) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
