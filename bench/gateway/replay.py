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
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from azure import Arrival, read_trace, timetable
from leaks import Pool, Sample, books, busy, grown, kept, look, slope
from player import NAME, Replay, Tally
from run import free_port, process
from stub import running_stub

from mxn.ledger import budget_admin, keys, tenants
from mxn.ledger.database import Database

REST_S = 8.0  # longer than idle connections are kept
MOST_REST_S = 30.0


async def _sampled(pool: Pool, replay: Replay, every_s: float, samples: list[Sample]) -> None:
    begun_s = time.monotonic()
    while True:
        samples.append(await asyncio.to_thread(look, pool, replay.tally, begun_s))
        _print(samples[-1])
        await asyncio.sleep(every_s)


async def _at_rest(pool: Pool, replay: Replay, before: Sample, begun_s: float) -> Sample:
    """Return the look at which everything is given back, or the last one in the time allowed."""
    until_s = time.monotonic() + MOST_REST_S
    await asyncio.sleep(REST_S)
    while True:
        found = look(pool, replay.tally, begun_s)
        if not kept(before, found) or time.monotonic() > until_s:
            return found
        await asyncio.sleep(1.0)


def _print(item: Sample) -> None:
    held = "  ".join(
        f"{name} {one.rss_kib / 1024:.1f} ({one.pss_kib / 1024:.1f}) MiB "
        f"{one.num_sockets} + {one.num_files} fds {one.num_threads} thr"
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
    warm = Replay(pool.url, pool.key, options.leave, options.seed + 1)
    first_ones = timetable(
        [Arrival(0.0, item.prompt_tokens, 1) for item in trace], options.warm, None
    )
    await warm.run(first_ones, 1e9, options.connections)
    await asyncio.sleep(REST_S)
    before = look(pool, warm.tally, time.monotonic())
    replay, samples = Replay(pool.url, pool.key, options.leave, options.seed), list[Sample]()
    sampler = asyncio.create_task(_sampled(pool, replay, options.every, samples))
    begun_s = time.monotonic()
    arrivals = timetable(trace, options.requests, options.hours)
    await replay.run(arrivals, options.speedup, options.connections)
    seconds = time.monotonic() - begun_s
    sampler.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sampler  # raises what ended it before, such as the death of a server
    samples.append(await _at_rest(pool, replay, before, begun_s))
    _print(samples[-1])
    tally = replay.tally
    slopes = {name: slope(samples, name) for name in pool.pids}
    wrong = warm.tally.problems + tally.problems
    problems = [f"{count} times {what}" for what, count in wrong.most_common(5)]
    problems += grown(slopes, samples[-1].requests, options.limit_kib) + kept(before, samples[-1])
    problems += await busy(pool) + books(pool, (warm.tally, tally), first.rows)
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
def models(
    folder: Path, model: str, count: int, kv_memory: str
) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Run servers of a model; yield their addresses and process ids."""
    with contextlib.ExitStack() as stack:
        urls, pids = [], {}
        for number in range(count):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            command = [
                sys.executable, "-m", "mxn.cli.main", "serve", model, "--name", NAME, "--device",
                "cpu", "--threads", "1", "--kv-memory", kv_memory, "--port", str(port),
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
    parser.add_argument(
        "--warm",
        type=int,
        default=1000,
        help="requests for one token before measuring, to fill bounded caches (real ones: 16000)",
    )
    parser.add_argument("--kv-memory", default="64MiB", help="of each replica of --model")
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
            urls, pids = stack.enter_context(
                models(folder, options.model, options.replicas, options.kv_memory)
            )
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
