"""Looks at something again and again while other work runs. Knows nothing of what is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Following:
    """Calls `look` in a thread every `every_s` seconds of the block, and once more behind it."""

    def __init__(self, look: Callable[[], None], *, every_s: float, name: str) -> None:
        self._look, self._every_s = look, every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._look()
        self._look()
