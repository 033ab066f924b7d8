"""Requests in the lengths of the Azure conversation trace, sent to any OpenAI-compatible server.

Prompts are token ids, answers are as long as in the trace, both scaled to a context (`jobs`). Two
ways to send them: `closed_loop` keeps a number of them under way, `open_loop` sends at the times of
a Poisson process whatever the server does. The same seed gives the same lengths in the same order
and, in units of the mean gap, the same arrival times. Knows HTTP; knows no engine.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from protocol import Failed

LENGTHS = Path(__file__).parent / "data/azure_conv_lengths.csv"


@dataclass(frozen=True, slots=True)
class Job:
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """`latency_s` from arrival to the last token, queueing included."""

    latency_s: float
    first_s: float
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers; `limit_s` ends a whole run, a hanging server with it."""

    url: str
    model: str
    limit_s: float = 600.0


def jobs(
    count: int, context: int, longest: int, vocab_size: int, seed: int, words: int = 0
) -> list[Job]:
    """Return requests with the trace's lengths, scaled so that its longest one fills `context`.

    The scale is context / longest; what is longer than `longest` tokens in the trace is left out.
    `seed` chooses the lengths, `words` the tokens: with new words no prefix cache finds anything.
    """
    with LENGTHS.open(newline="") as file:
        rows = [(int(a), int(b)) for a, b in list(csv.reader(file))[1:]]
    rows = [row for row in rows if sum(row) <= longest]
    lengths, tokens = random.Random(seed), random.Random(f"{seed}-{words}")
    scale = context / longest
    made = []
    for prompt_tokens, new_tokens in lengths.choices(rows, k=count):
        size = max(2, round(prompt_tokens * scale))
        ids = [tokens.randrange(256, vocab_size - 1000) for _ in range(size)]
        made.append(Job(ids, max(2, round(new_tokens * scale))))
    return made


async def ask(client: httpx.AsyncClient, model: str, job: Job) -> Answer:
    """Send one streamed completion and check its length.

    Raises: Failed for another status or a shorter answer: a rate with errors means nothing.
    """
    body: dict[str, Any] = {
        "model": model, "prompt": job.prompt, "max_tokens": job.new_tokens, "temperature": 0,
        "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started_s, first_s, tokens, is_done = time.perf_counter(), 0.0, 0, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise Failed(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            first_s = first_s or time.perf_counter() - started_s
            if line == "data: [DONE]":
                is_done = True
                break
            # Only the last event has usage: the others need not be parsed on a shared core.
            if '"usage"' in line:
                tokens = (json.loads(line[5:]).get("usage") or {}).get("completion_tokens", tokens)
    if not is_done or tokens != job.new_tokens:
        raise Failed(f"an answer has {tokens} tokens of {job.new_tokens}, done: {is_done}")
    return Answer(time.perf_counter() - started_s, first_s, tokens)


def arrivals(count: int, rate_per_s: float, seed: int) -> list[float]:
    """Return the gaps in s of a Poisson process, given that `count` come at exactly this rate."""
    rng = random.Random(seed)
    gaps = [rng.expovariate(1.0) for _ in range(count)]
    return [gap * count / sum(gaps) / rate_per_s for gap in gaps]


def open_loop(target: Target, work: list[Job], rate_per_s: float, seed: int) -> dict[str, Any]:
    """Send the work at Poisson times and sum up. Raises: Failed."""
    gaps = arrivals(len(work), rate_per_s, seed)

    async def send(client: httpx.AsyncClient) -> list[Answer]:
        started_s, at_s, tasks = time.perf_counter(), 0.0, []
        async with asyncio.TaskGroup() as group:
            for job, gap_s in zip(work, gaps, strict=True):
                at_s += gap_s
                await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
                tasks.append(group.create_task(ask(client, target.model, job)))
        return [task.result() for task in tasks]

    return _measured(target, send) | {"rate_per_s": round(rate_per_s, 4)}


def closed_loop(target: Target, work: list[Job], slots: int) -> dict[str, Any]:
    """Keep `slots` requests under way until the work is done. Raises: Failed.

    `capacity_per_s` counts only the time in which all slots were full: until the last request
    began, when the `slots` under way were half done on average.
    """
    left = iter(work)
    answers: list[Answer] = []
    times = [0.0, 0.0]  # of the first request and of the last one

    async def one_slot(client: httpx.AsyncClient) -> None:
        for job in left:
            times[1] = time.perf_counter()
            answers.append(await ask(client, target.model, job))

    async def send(client: httpx.AsyncClient) -> list[Answer]:
        times[0] = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(slots):
                group.create_task(one_slot(client))
        return answers

    found = _measured(target, send)
    full = (len(work) - slots / 2) / (times[1] - times[0])
    return found | {"capacity_per_s": round(full, 4)}


def _measured(target: Target, send: Any) -> dict[str, Any]:
    """Run `send` with a client, and sum up what came back."""

    async def run() -> list[Answer]:
        limits = httpx.Limits(max_connections=None)
        async with (
            asyncio.timeout(target.limit_s),
            httpx.AsyncClient(base_url=target.url, timeout=target.limit_s, limits=limits) as client,
        ):
            return await send(client)

    started_s, cpu_s = time.perf_counter(), time.process_time()
    try:
        answers = asyncio.run(run())
    except TimeoutError:
        raise Failed(f"not done in {target.limit_s:g} s") from None
    except ExceptionGroup as group:
        first = _first(group)
        if not isinstance(first, Failed | httpx.HTTPError):
            raise
        raise Failed(f"{type(first).__name__}: {first}") from None
    seconds = time.perf_counter() - started_s
    generator = (time.process_time() - cpu_s) / seconds
    return summary(answers, seconds) | {"generator_cores": round(generator, 3)}


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def summary(answers: Iterable[Answer], seconds: float) -> dict[str, float]:
    """Return rates and quantiles; output counts the time until the last answer was there."""
    found = list(answers)

    def at(part: float, values: list[float]) -> float:
        ordered = sorted(values)
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4)

    latencies = [answer.latency_s for answer in found]
    firsts = [answer.first_s for answer in found]
    tokens = sum(answer.new_tokens for answer in found)
    return {
        "requests": len(found), "seconds": round(seconds, 3),
        "requests_per_s": round(len(found) / seconds, 4),
        "output_tok_per_s": round(tokens / seconds, 3),
        "latency_p50_s": at(0.5, latencies), "latency_p95_s": at(0.95, latencies),
        "first_p50_s": at(0.5, firsts), "first_p95_s": at(0.95, firsts),
    }  # fmt: skip
