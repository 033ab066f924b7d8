"""A public trace, replayed fast through a gateway with its ledger on: does anything leak?

The trace's arrivals, sped up, go through a real `mxn gateway` to the stub or to replicas of a
shipped model. Every few seconds it is noted what the processes hold. At the end memory must not
have grown with the requests, and descriptors, KV pages, budgets and rows must be as at rest; else
the exit code is 1. Some clients leave in the middle. Start at `main`.

    python bench/gateway/replay.py AzureLLMInferenceTrace_conv.csv --hours 24 --speedup 100
    python bench/gateway/replay.py AzureLLMInferenceTrace_conv.csv --model FOLDER --requests 3000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import secrets
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from azure import Arrival, read_trace, timetable
from load import complete_size
from run import free_port, process
from samples import Held, growth, sample
from stub import running_stub

from mxn.ledger import budget_admin, keys, tenants
from mxn.ledger.balance import check
from mxn.ledger.database import Database

NAME = "stub"  # of the model, whichever it is: what `process` asks for
REST_S = 8.0  # longer than idle connections are kept
MOST_REST_S = 30.0
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_OUTPUT = re.compile(rb'"completion_tokens":\s*(\d+)')
_WORDS = ["who", "goes", "there", "my", "lord", "the", "king", "of", "night", "and", "love"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Servers under test: process ids by name, and where requests go."""

    url: str
    key: str
    database: Path
    pids: dict[str, int]
    replicas: tuple[str, ...]  # addresses that answer /load


@dataclass(slots=True)
class Tally:
    done: int = 0
    left: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    late_s: float = 0.0  # most that a request waited for a free connection
    problems: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    seconds: float
    requests: int
    rows: int
    database_bytes: int
    log_bytes: int  # of SQLite's write-ahead log, which is written again from its start
    held: dict[str, Held]


@dataclass(slots=True)
class Replay:
    """Sends a timetable over a fixed number of connections."""

    pool: Pool
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
        host, _, port = self.pool.url.partition("://")[2].partition(":")
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
            b"content-length: %d\r\n\r\n%b" % (self.pool.key.encode(), len(data), data)
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


def look(pool: Pool, tally: Tally, begun_s: float) -> Sample:
    """Return what everything holds now."""
    log = Path(f"{pool.database}-wal")
    with contextlib.closing(sqlite3.connect(pool.database)) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM usage").fetchone()
    return Sample(
        seconds=round(time.monotonic() - begun_s, 1),
        requests=tally.done + tally.left,
        rows=rows,
        database_bytes=pool.database.stat().st_size,
        log_bytes=log.stat().st_size if log.exists() else 0,
        held={name: sample(pid) for name, pid in pool.pids.items()},
    )


async def _sampled(replay: Replay, every_s: float, samples: list[Sample]) -> None:
    begun_s = time.monotonic()
    while True:
        samples.append(await asyncio.to_thread(look, replay.pool, replay.tally, begun_s))
        _print(samples[-1])
        await asyncio.sleep(every_s)


async def _at_rest(replay: Replay, before: Sample, begun_s: float) -> Sample:
    """Return the look at which everything is given back, or the last one in the time allowed."""
    until_s = time.monotonic() + MOST_REST_S
    await asyncio.sleep(REST_S)
    while True:
        found = look(replay.pool, replay.tally, begun_s)
        if not _kept(before, found) or time.monotonic() > until_s:
            return found
        await asyncio.sleep(1.0)


def _print(item: Sample) -> None:
    held = "  ".join(
        f"{name} {one.rss_kib / 1024:.1f} ({one.pss_kib / 1024:.1f}) MiB {one.num_fds} fds "
        f"{one.num_threads} thr"
        for name, one in item.held.items()
    )
    print(
        f"{item.seconds:7.1f} s {item.requests:7} requests {item.rows:7} rows "
        f"{item.database_bytes / 2**20:6.1f} + {item.log_bytes / 2**20:.1f} MiB  {held}",
        flush=True,
    )


async def drive(pool: Pool, options: argparse.Namespace) -> dict[str, Any]:
    """Replay everything and return the report."""
    trace = read_trace(options.trace, options.length_scale, options.longest)
    first = look(pool, Tally(), time.monotonic())  # rows of the look whether servers are up
    warm = Replay(pool, options.leave, options.seed + 1)
    await warm.run(timetable(trace, 4 * options.connections, None), 1e9, options.connections)
    await asyncio.sleep(REST_S)
    before = look(pool, warm.tally, time.monotonic())
    replay, samples = Replay(pool, options.leave, options.seed), list[Sample]()
    sampler = asyncio.create_task(_sampled(replay, options.every, samples))
    begun_s = time.monotonic()
    arrivals = timetable(trace, options.requests, options.hours)
    await replay.run(arrivals, options.speedup, options.connections)
    seconds = time.monotonic() - begun_s
    sampler.cancel()
    await asyncio.wait({sampler})
    samples.append(await _at_rest(replay, before, begun_s))
    _print(samples[-1])
    tally = replay.tally
    slopes = {name: _slope(samples, name) for name in pool.pids}
    problems = [f"{count} times {what}" for what, count in tally.problems.most_common(5)]
    problems += _grown(slopes, options.limit_kib) + _kept(before, samples[-1])
    problems += await _busy(pool) + _books(pool, (warm.tally, tally), first.rows)
    told = {name: getattr(options, name) for name in vars(options) if name not in ("trace", "json")}
    return {
        "options": told,
        "seconds": round(seconds, 1),
        "requests_per_s": round((tally.done + tally.left) / seconds, 1),
        "tally": asdict(tally),
        "kib_per_10000_requests": {name: round(value, 1) for name, value in slopes.items()},
        "bytes_per_row": round(samples[-1].database_bytes / samples[-1].rows),
        "before": asdict(before),
        "samples": [asdict(item) for item in samples],
        "problems": problems,
    }


def _slope(samples: list[Sample], name: str) -> float:
    """Return the growth of memory in KiB for 10,000 requests; the last look is at rest, so out."""
    at = [item.requests / 10_000 for item in samples[:-1]]
    return growth(at, [item.held[name].rss_kib for item in samples[:-1]])


def _grown(slopes: dict[str, float], limit_kib: float) -> list[str]:
    return [
        f"{name} grows by {slope:.0f} KiB for 10,000 requests, above {limit_kib:.0f}"
        for name, slope in slopes.items()
        if slope > limit_kib
    ]


def _kept(before: Sample, after: Sample) -> list[str]:
    problems = []
    for name, held in after.held.items():
        for what in ("num_fds", "num_threads"):
            was, is_now = getattr(before.held[name], what), getattr(held, what)
            if is_now > was:
                problems.append(f"{name} had {was} {what} at rest and has {is_now} afterwards")
    return problems


async def _busy(pool: Pool) -> list[str]:
    """Return what replicas still run or hold; pages kept for prompts to come are no part of it."""
    problems = []
    async with httpx.AsyncClient() as http:
        for url in pool.replicas:
            (model,) = (await http.get(f"{url}/load")).json()["models"].values()
            if model is None or model["running"] or model["waiting"] or model["kv_pages_used"]:
                problems.append(f"{url} still holds {model}")
    return problems


def _books(pool: Pool, tallies: tuple[Tally, ...], others: int) -> list[str]:
    """Return what the ledger and the clients do not agree on; `others`: rows of nobody counted."""
    database = Database.open(f"sqlite:///{pool.database}")
    problems = check(database)
    database.close()
    with contextlib.closing(sqlite3.connect(pool.database)) as connection:
        (num_open,) = connection.execute(
            "SELECT count(*) FROM usage WHERE state != 'settled'"
        ).fetchone()
        (reserved,) = connection.execute("SELECT sum(reserved) FROM budget_periods").fetchone()
        held = connection.execute(
            "SELECT count(*), sum(input_tokens), sum(output_tokens) FROM usage "
            "WHERE reason = 'complete'"
        ).fetchone()
    if num_open or reserved:
        problems.append(f"{num_open} rows are open, {reserved} tokens reserved")
    told = tuple(
        sum(getattr(tally, name) for tally in tallies)
        for name in ("done", "input_tokens", "output_tokens")
    )
    # Whoever left after the last token had a complete answer: their rows may stand here too.
    most = told[0] + sum(tally.left for tally in tallies) + others
    if not told[0] <= held[0] <= most or held[1] < told[1] or held[2] < told[2]:
        problems.append(f"(requests, input, output): clients were told {told}, rows say {held}")
    return problems


@contextlib.contextmanager
def pool_of(
    replicas: list[str], folder: Path, pids: dict[str, int], workers: int
) -> Iterator[Pool]:
    """Run a gateway with all accounting on before replicas that run already."""
    path = folder / "ledger.db"
    database = Database.open(f"sqlite:///{path}")
    with database.begin() as connection:
        now = time.time_ns() // 1000
        project = tenants.ensure_default(connection, now_us=now)
        _, key = keys.create_key(connection, project, name=secrets.token_hex(4), now_us=now)
        subject = tenants.Subject("project", project)
        budget_admin.set_budget(connection, subject, limit_amount=10**15, period="day", now_us=now)
    database.close()
    port = free_port()
    command = [
        sys.executable, "-m", "mxn.cli.main", "gateway", "--port", str(port), "--database",
        f"sqlite:///{path}", "--workers", str(workers), "--log-format", "text",
    ]  # fmt: skip
    is_stub = not pids
    for url in replicas:
        command += ["--replica", f"{NAME}={url}" + (",chip=stub" if is_stub else ",kind=mxn")]
    url = f"http://127.0.0.1:{port}"
    with process(command, url, {"authorization": f"Bearer {key}"}, MXN_HOME=str(folder)) as pid:
        yield Pool(
            url=url,
            key=key,
            database=path,
            pids={"gateway": pid} | pids,
            replicas=() if is_stub else tuple(replicas),
        )


@contextlib.contextmanager
def models(folder: Path, model: str, count: int) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Run servers of a model; yield their addresses and process ids."""
    with contextlib.ExitStack() as stack:
        urls, pids = [], {}
        for number in range(count):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            command = [
                sys.executable, "-m", "mxn.cli.main", "serve", model, "--name", NAME, "--device",
                "cpu", "--threads", "1", "--port", str(port),
            ]  # fmt: skip
            env = {"MXN_HOME": str(folder), "OMP_NUM_THREADS": "1"}
            pids[f"replica{number}"] = stack.enter_context(process(command, urls[-1], {}, **env))
        yield urls, pids


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="Azure LLM inference trace 2023, as CSV")
    parser.add_argument("--model", help="folder of a model; without it the stub answers")
    parser.add_argument("--replicas", type=int, default=2, help="of --model")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--hours", type=float, help="of the trace's time")
    parser.add_argument("--speedup", type=float, default=60.0)
    parser.add_argument("--length-scale", type=float, default=0.1)
    parser.add_argument("--longest", type=int, default=200, help="tokens of prompt or answer")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.02, help="share of clients that leave")
    parser.add_argument("--token-s", type=float, default=0.0, help="pause of the stub")
    parser.add_argument("--workers", type=int, default=1, help="of the gateway")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument(
        "--limit-kib", type=float, default=1024.0, help="growth allowed for 10,000 requests"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.requests is None) == (options.hours is None):
        parser.error("give one of --requests and --hours")
    return options


def main() -> None:
    import uvloop

    options = _options()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.model:
            urls, pids = stack.enter_context(models(folder, options.model, options.replicas))
        else:
            urls, pids = (
                [stack.enter_context(running_stub(is_sized=True, token_s=options.token_s))],
                {},
            )
        pool = stack.enter_context(pool_of(urls, folder, pids, options.workers))
        report = uvloop.run(drive(pool, options))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in report if key != "samples"}, indent=1))
    raise SystemExit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
