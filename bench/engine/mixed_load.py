"""Conversations of many lengths against any OpenAI-compatible server: goodput at a p95 latency.

    python bench/engine/mixed_load.py http://127.0.0.1:8000 --model NAME --rates 0.7x --p95 60

Lengths come from the Azure conversation trace (data/README.md), scaled to the context; arrivals are
a Poisson process with a seed. Prompts are token ids, answers are as long as in the trace. A rate
like 0.7x is that part of the server's own capacity, measured first with all slots full. Knows no
engine. Start at `open_loop`.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

LENGTHS = Path(__file__).parent / "data/azure_conv_lengths.csv"
TIMEOUT_S = 1800.0


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


def jobs(count: int, context: int, longest: int, vocab_size: int, seed: int) -> list[Job]:
    """Return requests with the trace's lengths, scaled so that its longest one fills `context`.

    The scale is context / longest; what is longer than `longest` tokens in the trace is left out.
    """
    with LENGTHS.open(newline="") as file:
        rows = [(int(a), int(b)) for a, b in list(csv.reader(file))[1:]]
    rows = [row for row in rows if sum(row) <= longest]
    rng = random.Random(seed)
    scale = context / longest
    made = []
    for prompt_tokens, new_tokens in rng.choices(rows, k=count):
        size = max(2, round(prompt_tokens * scale))
        ids = [rng.randrange(256, vocab_size - 1000) for _ in range(size)]
        made.append(Job(ids, max(2, round(new_tokens * scale))))
    return made


async def ask(client: httpx.AsyncClient, model: str, job: Job) -> Answer:
    """Send one streamed completion and check its length.

    Raises: SystemExit for another status or a shorter answer: a rate with errors means nothing.
    """
    body: dict[str, Any] = {
        "model": model, "prompt": job.prompt, "max_tokens": job.new_tokens, "temperature": 0,
        "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started_s, first_s, tokens, is_done = time.perf_counter(), 0.0, 0, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            first_s = first_s or time.perf_counter() - started_s
            if line == "data: [DONE]":
                is_done = True
                break
            tokens = (json.loads(line[5:]).get("usage") or {}).get("completion_tokens", tokens)
    if not is_done or tokens != job.new_tokens:
        raise SystemExit(f"an answer has {tokens} tokens of {job.new_tokens}, done: {is_done}")
    return Answer(time.perf_counter() - started_s, first_s, tokens)


async def open_loop(url: str, model: str, work: list[Job], rate_per_s: float, seed: int) -> dict:
    """Send the work at Poisson times, whatever the server does, and sum up."""
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        started_s, at_s, tasks = time.perf_counter(), 0.0, []
        for job in work:
            at_s += rng.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, model, job)))
        answers = await asyncio.gather(*tasks)
        return _summary(answers, time.perf_counter() - started_s) | {"rate_per_s": rate_per_s}


async def closed_loop(url: str, model: str, work: list[Job], slots: int) -> dict:
    """Keep `slots` requests under way until the work is done: the server's capacity."""
    left = iter(work)
    answers: list[Answer] = []

    async def one_slot(client: httpx.AsyncClient) -> None:
        for job in left:
            answers.append(await ask(client, model, job))

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        started_s = time.perf_counter()
        await asyncio.gather(*(one_slot(client) for _ in range(slots)))
        return _summary(answers, time.perf_counter() - started_s)


def _summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    def at(part: float, values: list[float]) -> float:
        ordered = sorted(values)
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4)

    latencies = [answer.latency_s for answer in answers]
    firsts = [answer.first_s for answer in answers]
    tokens = sum(answer.new_tokens for answer in answers)
    return {
        "requests": len(answers), "seconds": round(seconds, 3),
        "requests_per_s": round(len(answers) / seconds, 4),
        "output_tok_per_s": round(tokens / seconds, 3),
        "latency_p50_s": at(0.5, latencies), "latency_p95_s": at(0.95, latencies),
        "first_p50_s": at(0.5, firsts), "first_p95_s": at(0.95, firsts),
    }  # fmt: skip


def goodput(rows: list[dict[str, Any]], p95_s: float) -> dict[str, Any] | None:
    """Return the row with the most output whose p95 latency is allowed; None: no rate was."""
    allowed = [row for row in rows if row["latency_p95_s"] <= p95_s]
    return max(allowed, key=lambda row: row["output_tok_per_s"], default=None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--model", default="model")
    parser.add_argument("--rates", default="0.7x", help="requests/s, or parts of capacity: 0.7x")
    parser.add_argument("--p95", type=float, default=60.0, help="allowed p95 latency, seconds")
    parser.add_argument("--requests", type=int, default=60, help="of each rate")
    parser.add_argument("--slots", type=int, default=16, help="under way in the capacity run")
    parser.add_argument("--context", type=int, default=1024, help="tokens the longest one fills")
    parser.add_argument("--longest", type=int, default=4096, help="longest one kept of the trace")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    make = (arguments.context, arguments.longest, arguments.vocab)
    # A set of prompts of its own for each run: a server's prefix cache must find nothing.
    capacity = None
    rows = []
    for number, text in enumerate(arguments.rates.split(",")):
        rate = float(text.rstrip("x"))
        if text.endswith("x"):
            if capacity is None:
                work = jobs(arguments.requests, *make, arguments.seed)
                slots = arguments.slots
                capacity = asyncio.run(closed_loop(arguments.url, arguments.model, work, slots))
                print(f"capacity: {capacity}")
            rate *= capacity["requests_per_s"]
        work = jobs(arguments.requests, *make, arguments.seed + 1 + number)
        rows.append(
            asyncio.run(open_loop(arguments.url, arguments.model, work, rate, arguments.seed))
        )
        print(f"{text}: {rows[-1]}")
    document = {
        "schema": 1, "case": "engine_mixed_load", "basis": "measured",
        "arrivals": "Poisson", "lengths": LENGTHS.name, "params": vars(arguments),
        "capacity": capacity, "rows": rows, "goodput": goodput(rows, arguments.p95),
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
