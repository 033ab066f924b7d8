"""Waits for the next item of an iterator, and ends the wait when it takes too long.

One lazy timer per stream instead of one per item: an item costs two attribute writes and a look at
the clock. Knows nothing of replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN_S = 1.0  # an iterator whose clean-up hangs is cancelled again after this


class Stalled(Exception):
    """No item came in time."""


class Watch:
    """Guards the waits of one consumer.

    `gives_up(waited_s, limit_s)` is asked when the limit has passed; False: look again
    after another limit.
    """

    __slots__ = (
        "_clock",
        "_gives_up",
        "_limit_s",
        "_loop",
        "_num_cancels",
        "_since_s",
        "_task",
        "_timer",
        "waited_s",
    )  # fmt: skip

    def __init__(
        self, limit_s: float, gives_up: Callable[[float, float], bool], clock: Callable[[], float]
    ) -> None:
        self._limit_s = limit_s
        self.waited_s = 0.0  # for the last item
        self._gives_up = gives_up
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._since_s = 0.0
        self._num_cancels = 0
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(limit_s, self._look)

    async def next(self, items: AsyncIterator[T]) -> T:
        """Return the next item. Raises: Stalled, StopAsyncIteration, and what `items` raises."""
        task = asyncio.current_task()
        assert task is not None, "Watch.next runs in a task"
        begun_s = self._since_s = self._clock()
        self._task = task
        try:
            item = await items.__anext__()
        except BaseException as exc:  # whatever the iterator makes of our cancellation
            is_ours = bool(self._num_cancels) and not self._uncancel(task)
            if is_ours and isinstance(exc, asyncio.CancelledError | Exception):
                raise Stalled from exc
            raise
        finally:
            self._task = None
            self.waited_s = self._clock() - begun_s
        if self._num_cancels and not self._uncancel(task):  # the iterator swallowed it
            raise Stalled
        return item

    def set_limit(self, limit_s: float) -> None:
        """Use another limit from the next item on."""
        self._limit_s = limit_s
        self.close()
        self._timer = self._loop.call_later(limit_s, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _uncancel(self, task: asyncio.Task[Any]) -> bool:
        """Take our own cancellations back; return whether there are others."""
        rest = task.cancelling()
        while self._num_cancels:
            self._num_cancels -= 1
            rest = task.uncancel()
        return rest > 0

    def _look(self) -> None:
        limit_s = self._limit_s
        waited_s = self._clock() - self._since_s if self._task is not None else 0.0
        again_s = limit_s
        if self._task is not None:
            if self._num_cancels or (waited_s >= limit_s and self._gives_up(waited_s, limit_s)):
                self._num_cancels += 1
                self._task.cancel()
                again_s = _AGAIN_S
            elif waited_s < limit_s:
                again_s = limit_s - waited_s
        self._timer = self._loop.call_later(again_s, self._look)
