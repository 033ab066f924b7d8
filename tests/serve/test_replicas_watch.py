"""Waiting for an iterator: our own cancellation leaves no trace, whatever it is answered with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from mxn.engine.protocol import Delta, Generate, SamplingParams
from mxn.errors import EngineDiedError, InternalError
from mxn.serve.routing.seam import Seam
from mxn.serve.watch import Stalled, Watch


async def answers_with(error: BaseException | None) -> AsyncIterator[int]:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if error is not None:
            raise error from None
    for item in ():
        yield item  # ends without an item


@pytest.mark.parametrize(
    "error", [None, EngineDiedError("gone"), ValueError("odd"), asyncio.CancelledError()], ids=repr
)
def test_a_stalled_iterator_is_a_stall_and_the_task_is_not_cancelled(
    error: BaseException | None,
) -> None:
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        watch = Watch(0.01, lambda waited_s, limit_s: True, time.monotonic)
        with pytest.raises(Stalled):
            await watch.next(answers_with(error))
        watch.close()
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):  # which is a cancellation that must be known from ours
            async with asyncio.timeout(0.01):
                await asyncio.sleep(1)

    asyncio.run(work())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def work() -> None:
        watch = Watch(9, lambda waited_s, limit_s: True, time.monotonic)
        task = asyncio.ensure_future(watch.next(answers_with(EngineDiedError("gone"))))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(EngineDiedError):
            await task
        assert task.cancelling() == 1
        watch.close()

    asyncio.run(work())


def test_an_answer_that_does_not_go_on_is_told_without_its_text() -> None:
    seam = Seam(Generate(request_id="q", prompt_ids=[1], sampling=SamplingParams()))
    seam.take(Delta(request_id="q", token_ids=[1, 2], text="private words", completion_tokens=2))
    seam.move()
    with pytest.raises(InternalError, match="5 characters before its end") as caught:
        seam.take(Delta(request_id="q", token_ids=[3], text="private WORDS", completion_tokens=3))
    assert "private" not in str(caught.value)
    assert "WORDS" not in str(caught.value)
