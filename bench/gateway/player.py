"""Plays a timetable of requests over a fixed number of connections and checks every answer.

Some clients leave after the first bytes. Knows no processes and no ledger. Start at `Replay.run`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from azure import Arrival
from load import complete_size

NAME = "stub"  # of the model, whichever it is: what `run.process` asks for
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_OUTPUT = re.compile(rb'"completion_tokens":\s*(\d+)')
_WORDS = ["who", "goes", "there", "my", "lord", "the", "king", "of", "night", "and", "love"]


@dataclass(slots=True)
class Tally:
    done: int = 0
    left: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    late_s: float = 0.0  # most that a request waited for a free connection
    problems: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Replay:
    """Sends a timetable over a fixed number of connections."""

    url: str
    key: str
    leave: float
    seed: int
    tally: Tally = field(default_factory=Tally)

    async def run(self, arrivals: Iterator[Arrival], speedup: float, connections: int) -> None:
        queue: asyncio.Queue[tuple[float, Arrival] | None] = asyncio.Queue()
        workers = [asyncio.create_task(self._work(queue, n)) for n in range(connections)]
        begun_s = time.monotonic()
        for arrival in arrivals:
            due_s = begun_s + arrival.at_s / speedup
            wait_s = due_s - time.monotonic()
            if wait_s > 0.002:  # timers are no finer, and a request a hair early hurts nobody
                await asyncio.sleep(wait_s)
            while queue.qsize() > 10 * connections:  # the server is the limit: no endless queue
                await asyncio.sleep(0.01)
            queue.put_nowait((due_s, arrival))
        for _ in workers:
            queue.put_nowait(None)
        await asyncio.gather(*workers)

    async def _work(self, queue: asyncio.Queue[Any], number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        streams = None
        while (item := await queue.get()) is not None:
            due_s, arrival = item
            self.tally.late_s = max(self.tally.late_s, time.monotonic() - due_s)
            try:
                streams = streams or await asyncio.open_connection(*self._place())
                can_stay = await self._ask(*streams, arrival, rng)
            except (OSError, ValueError) as error:
                self.tally.problems[repr(error)[:300]] += 1
                can_stay = False
            if not can_stay and streams is not None:
                streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()

    def _place(self) -> tuple[str, int]:
        host, _, port = self.url.partition("://")[2].partition(":")
        return host, int(port)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, arrival: Arrival,
        rng: random.Random,
    ) -> bool:  # fmt: skip
        """Send one request and read its answer; return whether the connection can be used again."""
        leaves = rng.random() < self.leave
        writer.write(self._request(arrival, rng))
        answer = b""
        while complete_size(answer) is None:
            piece = await reader.read(1 << 16)
            if not piece:
                raise ValueError(f"the connection ended: {answer[:300]!r}")
            answer += piece
            if leaves:
                self.tally.left += 1
                return False
        self.tally.done += 1
        self._check(answer, arrival)
        return True

    def _request(self, arrival: Arrival, rng: random.Random) -> bytes:
        prompt = " ".join(rng.choices(_WORDS, k=arrival.prompt_tokens))
        body: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": f"#{rng.randint(1, 10**9)}# {prompt}"}],
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
        }
        if rng.random() < 0.8:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
            b"content-type: application/json\r\nauthorization: Bearer %b\r\n"
            b"content-length: %d\r\n\r\n%b" % (self.key.encode(), len(data), data)
        )

    def _check(self, answer: bytes, arrival: Arrival) -> None:
        problems = self.tally.problems
        prompt, output = _PROMPT.findall(answer), _OUTPUT.findall(answer)
        if not answer.startswith(b"HTTP/1.1 200"):
            problems[answer[:300].decode(errors="replace")] += 1
        elif not output or int(output[-1]) != arrival.output_tokens:
            problems[f"{output} tokens instead of {arrival.output_tokens}"] += 1
        elif b"text/event-stream" in answer[:2000] and b"data: [DONE]" not in answer[-100:]:
            problems[f"a stream that ends with {answer[-100:]!r}"] += 1
        else:
            self.tally.input_tokens += int(prompt[-1])
            self.tally.output_tokens += int(output[-1])
