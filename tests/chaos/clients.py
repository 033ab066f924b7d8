"""Clients of several tenants that send random requests and write down what they got."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_RESTART_S = 60.0  # how long no gateway may listen
PROMPTS = [
    "Who goes there?", "What say you, good sir?", "Speak of love", "Tell me of the king",
    "Once more unto the breach", "O Romeo", "My lord", "A horse",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    key: str
    budget_tokens: int | None = None


@dataclass(slots=True)
class Outcome:
    """What a client knows of one request. `usage_id` None: it never got an id."""

    tenant: str
    kind: str  # finished, refused, cut, gone, failed
    usage_id: str | None = None
    status: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    choices: int = 1
    greedy: tuple[str, int] | None = None  # prompt and limit, where the text must be the same
    problem: str = ""
    has_left: bool = True  # False: no gateway took the connection


@dataclass(slots=True)
class Load:
    """Sends `count` requests, `at_once` at a time, to whichever gateway."""

    urls: Sequence[str]
    tenants: Sequence[Tenant]
    count: int
    at_once: int = 24
    seed: int = 0
    longest: int = 40
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, failure: Callable[[], Exception | None] = lambda: None) -> list[Outcome]:
        """Send all, and stop early when `failure` says that the experiment has failed."""
        numbers = iter(range(self.count))
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=90, limits=limits) as http:
            clients = [
                asyncio.create_task(self._client(http, numbers)) for _ in range(self.at_once)
            ]
            while not all(client.done() for client in clients):
                if failure() is not None:
                    for client in clients:
                        client.cancel()
                await asyncio.wait(clients, timeout=1)
        for client in clients:
            if not client.cancelled():
                client.result()
        return self.outcomes

    async def _client(self, http: httpx.AsyncClient, numbers: Any) -> None:
        for number in numbers:
            outcome = await self._until_it_leaves(http, self.seed * 1_000_003 + number)
            self.outcomes.append(outcome)
            if outcome.kind == "failed":
                await asyncio.sleep(0.1)  # a gateway is on its way back

    async def _until_it_leaves(self, http: httpx.AsyncClient, seed: int) -> Outcome:
        """Send one request; while nobody listens it has not left, and is tried again."""
        give_up_s = time.monotonic() + _RESTART_S
        while True:
            outcome = await self._request(http, random.Random(seed))
            if outcome.has_left or time.monotonic() > give_up_s:
                return outcome
            await asyncio.sleep(0.1)

    async def _request(self, http: httpx.AsyncClient, rng: random.Random) -> Outcome:
        tenant = rng.choice(self.tenants)
        prompt, limit = rng.choice(PROMPTS), rng.randint(1, self.longest)
        body: dict[str, Any] = {
            "model": "m",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": limit,
            "temperature": 0 if rng.random() < 0.7 else 1,
            "n": 2 if rng.random() < 0.1 else 1,
        }
        outcome = Outcome(tenant.name, "failed", choices=body["n"])
        if body["temperature"] == 0 and body["n"] == 1:
            outcome.greedy = (prompt, limit)
        leaves_after = rng.randint(0, 20) if rng.random() < 0.15 else None
        url = f"{rng.choice(self.urls)}/v1/chat/completions"
        headers = {"authorization": f"Bearer {tenant.key}"}
        try:
            if rng.random() < 0.4:
                await self._whole(http, url, headers, body, outcome, leaves_after)
            else:
                await self._stream(http, url, headers, body, outcome, leaves_after)
        except (httpx.HTTPError, OSError) as error:
            outcome.kind = "cut" if outcome.usage_id else "failed"
            outcome.problem = repr(error)
            outcome.has_left = not isinstance(error, httpx.ConnectError)
        return outcome

    async def _whole(
        self, http: httpx.AsyncClient, url: str, headers: dict[str, str], body: dict[str, Any],
        outcome: Outcome, leaves_after: int | None,
    ) -> None:  # fmt: skip
        work = asyncio.create_task(http.post(url, json=body, headers=headers))
        if leaves_after is not None:
            done, _ = await asyncio.wait({work}, timeout=leaves_after / 200)
            if not done:
                work.cancel()
                await asyncio.wait({work})
                outcome.kind = "gone"
                return
        answer = await work
        outcome.status = answer.status_code
        if answer.status_code != 200:
            outcome.kind, outcome.problem = "refused", answer.text
            return
        value = answer.json()
        outcome.usage_id = value["id"]
        outcome.text = value["choices"][0]["message"]["content"] or ""
        _count(outcome, value["usage"])
        outcome.kind = "finished"

    async def _stream(
        self, http: httpx.AsyncClient, url: str, headers: dict[str, str], body: dict[str, Any],
        outcome: Outcome, leaves_after: int | None,
    ) -> None:  # fmt: skip
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        num_events = 0
        async with http.stream("POST", url, json=body, headers=headers) as answer:
            outcome.status = answer.status_code
            if answer.status_code != 200:
                outcome.kind, outcome.problem = "refused", (await answer.aread()).decode()
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    outcome.kind = "finished" if not outcome.problem else "cut"
                    return
                if not line.startswith("data: "):
                    continue
                value = json.loads(line[6:])
                if "error" in value:
                    outcome.problem = json.dumps(value["error"])
                    continue
                outcome.usage_id = value["id"]
                if value.get("usage"):
                    _count(outcome, value["usage"])
                for choice in value["choices"]:
                    if choice["index"] == 0:
                        outcome.text += choice["delta"].get("content") or ""
                num_events += 1
                if leaves_after is not None and num_events > leaves_after:
                    outcome.kind = "gone"
                    return
        outcome.kind = "cut"
        outcome.problem = outcome.problem or "the stream ended without [DONE]"


def _count(outcome: Outcome, usage: dict[str, Any]) -> None:
    outcome.input_tokens = usage["prompt_tokens"]
    outcome.output_tokens = usage["completion_tokens"]
