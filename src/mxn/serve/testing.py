"""A replica that resumes, and fails on request: for tests of the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from mxn.engine.protocol import Delta, Encode, Encoded, EngineStats, Generate, ModelInfo
from mxn.errors import EngineDiedError, MxnError


class Scripted:
    """Answers with the letters a, b, c, …; token i is letter i. Keeps the contract of resuming.

    `dies_at`: after that many tokens in all; `stalls_at`: says nothing more; `holds`: letters of
    text that lag behind the ids; `refuses`: raised before the first token.
    """

    def __init__(
        self,
        *,
        chip: str = "sim-a",
        num_tokens: int = 10,
        dies_at: int | None = None,
        stalls_at: int | None = None,
        gives_up_at: int | None = None,
        holds: int = 0,
        refuses: Exception | None = None,
        token_s: float = 0.0,
        vocab_size: int = 26,
        max_context: int = 100,
        swallows_cancel: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.dies_at, self.stalls_at, self.gives_up_at = dies_at, stalls_at, gives_up_at
        self.holds = holds
        self.refuses = refuses
        self.token_s = token_s
        self.swallows_cancel = swallows_cancel
        self.retry_after_s = retry_after_s
        self.seen: list[Generate | Encode] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.is_closed = False
        self.is_healthy = True
        self.info = ModelInfo(
            kind="decoder", family="double", path="double", device="sim:0", chip=chip,
            dtype="float32", max_context=max_context, vocab_size=vocab_size, num_parameters=0,
            eos_ids=(25,),
        )  # fmt: skip

    def die(self) -> None:
        self.is_healthy = False

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        self.seen.append(request)
        if not self.is_healthy:
            raise self._died()
        if self.refuses is not None:
            raise self.refuses
        self.num_running += 1
        is_over = False
        try:
            made = list(request.resume_ids)
            said = 0
            while not is_over:
                await self._pause(len(made))
                new = [len(made) % 26]
                made += new
                is_over = len(made) >= min(
                    self.num_tokens, request.sampling.max_tokens or self.num_tokens
                )
                text = "".join(chr(ord("a") + i) for i in made)
                upto = len(text) if is_over else max(said, len(text) - self.holds)
                text, said = text[said:upto], upto
                yield Delta(
                    request_id=request.request_id,
                    token_ids=new,
                    text=text,
                    finish_reason="length" if is_over else None,
                    prompt_tokens=len(request.prompt_ids),
                    cached_tokens=len(self.seen),
                    completion_tokens=len(made),
                    device_s=0.5 if is_over else 0.0,
                )
        finally:
            self.num_running -= 1
            self.num_cancelled += not is_over

    async def _pause(self, num_made: int) -> None:
        await asyncio.sleep(self.token_s)
        if self.dies_at is not None and num_made >= self.dies_at:
            self.is_healthy = False
        if not self.is_healthy:
            raise self._died()
        if self.gives_up_at is not None and num_made >= self.gives_up_at:
            raise EngineDiedError("gave it up", retry_after_s=1.0)
        if self.stalls_at is not None and num_made >= self.stalls_at:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if not self.swallows_cancel:
                        raise
                    self.swallows_cancel = False

    async def encode(self, request: Encode) -> Encoded:
        self.seen.append(request)
        await self._pause(0)
        if self.refuses is not None:
            raise self.refuses
        rows = [bytes(4)] * len(request.sequences)
        return Encoded(request_id=request.request_id, rows=rows, prompt_tokens=1)

    async def stats(self) -> EngineStats:
        if not self.is_healthy:
            raise self._died()
        return EngineStats(num_running=self.num_running, requests_total=len(self.seen))

    async def close(self) -> None:
        self.is_closed = True
        self.is_healthy = False

    def _died(self) -> MxnError:
        return EngineDiedError("the double died", retry_after_s=self.retry_after_s)
