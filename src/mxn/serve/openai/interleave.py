"""The deltas of several engine requests as one stream; knows the replica contract, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from mxn.engine.protocol import Delta, EngineClient, Generate


async def merge(
    client: EngineClient, requests: list[Generate]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Interleave the deltas of several engine requests; the common case of one costs nothing."""
    if len(requests) == 1:
        async with aclosing(_generator(client, requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    # Bounded, so that a slow reader slows its own requests down instead of filling the memory.
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(
        4 * len(requests)
    )
    tasks = [
        asyncio.create_task(_pump(client, request, index, queue))
        for index, request in enumerate(requests)
    ]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(client: EngineClient, request: Generate, index: int, queue: asyncio.Queue) -> None:
    try:
        async with aclosing(_generator(client, request)) as deltas:
            async for delta in deltas:
                await queue.put((index, delta))
    except Exception as exc:  # handed to the reader, which raises it
        await queue.put(exc)
    else:
        await queue.put(None)


def _generator(client: EngineClient, request: Generate) -> AsyncGenerator[Delta, None]:
    """Name the fact that a replica's iterator can be closed early, which cancels the request."""
    return cast("AsyncGenerator[Delta, None]", client.generate(request))
