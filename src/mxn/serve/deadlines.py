"""Work that ends when the time of its request is over. Knows no models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from mxn.errors import DeadlineError

T = TypeVar("T")


async def in_time(work: Coroutine[Any, Any, T], deadline_s: float | None) -> T:
    """Return what `work` returns, cancelled at `deadline_s` on the clock of `time.monotonic`.

    None: there is no limit. Raises: DeadlineError.
    """
    if deadline_s is None:
        return await work
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(deadline_s + loop.time() - time.monotonic()):
            return await work
    except TimeoutError:
        raise DeadlineError("the request took longer than its time limit") from None
