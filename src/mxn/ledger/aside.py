"""A blocking call beside the event loop that may never come back. Knows no database."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


async def call_aside(work: Callable[[], object], limit_s: float) -> None:
    """Run `work` in a thread of its own and wait for it up to `limit_s`.

    Not in the pool of threads: the process could not end while one of those is stuck, as in a
    database that took the question and never answers. Raises: TimeoutError, and what `work` raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def end(error: Exception | None) -> None:
        if done.done():  # nobody waits any more
            if error is not None:
                log.warning("what was no longer waited for failed: %s", error)
        elif error is not None:
            done.set_exception(error)
        else:
            done.set_result(None)

    def run() -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(end, error)
        except RuntimeError:
            log.debug("the event loop was over before %r: %s", work, error)

    threading.Thread(target=run, name="mxn-ledger-aside", daemon=True).start()
    await asyncio.wait_for(done, limit_s)
