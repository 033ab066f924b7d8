"""Conversations of many lengths under Poisson arrivals: how much each server gets done in time.

    python bench/engine/mixed_load.py --peers FOLDER --minutes 20

Starts `mxn serve`, a thin server around OpenVINO GenAI and llama-server on the same checkpoint, all
with all threads, and asks one after another. Lengths are those of the Azure conversation trace
(data/README.md), scaled to what two cores can do: by 1/8, so that 4,096 tokens of the trace are 512
here (longer ones, 8 %, are left out) and the mean request is a prompt of 112 and an answer of 28
tokens. Every run sends the same lengths in the same order, with words that no cache has seen.

1. Capacity: requests/s while all slots are full (closed loop).
2. 70 %: Poisson arrivals at 0.7 of each server's own capacity; its p95 latency (arrival to the last
   token, queueing included).
3. The limit of p95 latency is that of the best peer in step 2, the one that got the most done; or
   `--p95`. It is the same for all.
4. Goodput: the highest arrival rate at which a server keeps its p95 latency within the limit, found
   by bisection below its capacity (a rate above it is kept for the length of a run only). The best
   peer's goodput is its own 70 % by construction; ours divided by the best peer's is the ratio.

Each rate is run `--repeats` times, each with other arrivals, drawn alike for every server; what
counts is the median of the runs, so nobody has more tries than another. In steps 1 and 2 servers
take turns. The bisection stops when the minutes are over; its result is a lower bound then.

The load generator shares the cores: `generator_cores` says with how much. Knows no engine. Start at
`main`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import models
import traffic
from protocol import Failed, end_on_signal
from servers import MODEL, Server, Sizes
from setup_peers import default_folder
from traffic import Target

DEFAULT = "mxn:int4-g128,openvino:int4,llama.cpp:q4_0"
PART = 0.7  # of its capacity that a server gets in step 2
WARM = 8  # requests before anything is measured

Run = Callable[[float], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Work:
    """Makes the requests of a run: always the same lengths, each time new words."""

    count: int
    context: int
    longest: int
    vocab_size: int
    seed: int

    def jobs(self, words: int, count: int = 0) -> list[traffic.Job]:
        return traffic.jobs(
            count or self.count, self.context, self.longest, self.vocab_size, self.seed, words
        )


@dataclass(slots=True)
class Session:
    """The servers that still take part, and what was found."""

    work: Work
    slots: int
    running: dict[str, Server] = field(default_factory=dict)
    capacity: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    repeats: int = 3
    num_runs: int = 0

    def words(self) -> int:
        self.num_runs += 1
        return self.num_runs


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def attempt(session: Session, name: str, what: str, step: Callable[[Target], Any]) -> Any:
    """Return what a step gives; a server that fails is ended and named, and gives None."""
    server = session.running[name]
    try:
        found = step(server.target)
    except Failed as error:
        session.notes[name] = f"{what}: {error}"
        note(f"{name} left out: {what}: {error}")
        server.stop()
        del session.running[name]
        return None
    note(f"{name} {what}: {found}")
    return found


def measure_capacity(session: Session) -> None:
    """Warm each server up, then measure it with all slots full, in turns."""
    for name in list(session.running):
        warm = session.work.jobs(session.words(), WARM)
        attempt(session, name, "warm", partial(traffic.closed_loop, work=warm, slots=WARM // 2))
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(session.repeats):
        for name in list(session.running):
            full = session.work.jobs(session.words())
            step = partial(traffic.closed_loop, work=full, slots=session.slots)
            row = attempt(session, name, "capacity", step)
            if row is not None:
                found.setdefault(name, []).append(row)
    for name, rows in found.items():
        session.capacity[name] = median(rows, "capacity_per_s")


def measure_parts(session: Session, until_s: float) -> None:
    """Let each server have its part of its capacity, in turns."""
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(session.repeats):
        for name in list(session.running):
            rate = PART * session.capacity[name]["capacity_per_s"]
            row = run_once(session, name, rate, repeat, until_s)
            if row is not None:
                found.setdefault(name, []).append(row)
    for name, rows in found.items():
        session.rows[name] = [median(rows, "latency_p95_s")]


def measure_rate(session: Session, name: str, rate_per_s: float, until_s: float) -> None:
    """Send everything at this rate, several times, and keep the median, if all can end in time."""
    rows = []
    for repeat in range(session.repeats):
        row = run_once(session, name, rate_per_s, repeat, until_s)
        if row is None:
            return
        rows.append(row)
    session.rows[name].append(median(rows, "latency_p95_s"))


def run_once(
    session: Session, name: str, rate_per_s: float, repeat: int, until_s: float
) -> dict[str, Any] | None:
    """Return one run at a rate; None where it fails or could not end in time."""
    if name not in session.running:
        return None
    seen = [row["latency_p95_s"] for row in session.rows.get(name, [])]
    seconds = session.work.count / rate_per_s + max(seen, default=0.0)
    if time.monotonic() + seconds > until_s:
        session.notes[f"{name} at {rate_per_s:.3g}/s"] = f"no time for {seconds:.0f} s more"
        return None
    step = partial(
        traffic.open_loop, work=session.work.jobs(session.words()), rate_per_s=rate_per_s,
        seed=session.work.seed + repeat,
    )  # fmt: skip
    return attempt(session, name, f"at {rate_per_s:.3g}/s", step)


def median(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Return the row in the middle by `key`, with what the others had; of two the worse one.

    Worse: a higher latency, a lower capacity.
    """
    ordered = sorted(rows, key=lambda row: row[key], reverse=key != "latency_p95_s")
    return ordered[len(ordered) // 2] | {"all": [row[key] for row in rows]}


def best_peer(rows: dict[str, list[dict[str, Any]]]) -> str | None:
    """Return the peer that got the most done at 70 % of its capacity; None: only ours ran."""
    peers = [name for name, found in rows.items() if found and not name.startswith("mxn:")]
    return max(peers, key=lambda name: rows[name][0]["rate_per_s"], default=None)


def bounds(rows: list[dict[str, Any]], capacity: float, p95_s: float) -> tuple[float, float]:
    """Return the highest rate within the limit and the lowest above it; capacity if none was."""
    above = [row["rate_per_s"] for row in rows if row["latency_p95_s"] > p95_s]
    high = min([capacity, *above])
    within = [row["rate_per_s"] for row in rows if row["latency_p95_s"] <= p95_s]
    return max([rate for rate in within if rate <= high], default=0.0), high


def search(session: Session, p95_s: float, probes: int, until_s: float) -> None:
    """Bisect the rate of each server, ours first, while there is time for one more run."""
    order = sorted(session.running, key=lambda name: not name.startswith("mxn:"))
    for _ in range(probes):
        for name in order:
            if name not in session.running or not session.rows.get(name):
                continue
            capacity = session.capacity[name]["capacity_per_s"]
            low, high = bounds(session.rows[name], capacity, p95_s)
            rate = (low + high) / 2
            is_known = session.rows[name][0]["latency_p95_s"] == p95_s  # it made the limit
            if is_known or high - low < 0.05 * high:
                continue
            measure_rate(session, name, rate, until_s)


def goodput(rows: list[dict[str, Any]], p95_s: float) -> dict[str, Any] | None:
    """Return the row with the highest rate whose p95 latency is allowed; None: no rate was."""
    allowed = [row for row in rows if row["latency_p95_s"] <= p95_s]
    return max(allowed, key=lambda row: row["rate_per_s"], default=None)


def ratios(found: dict[str, dict[str, Any] | None]) -> dict[str, float]:
    """Return the goodput of each of ours divided by the best peer's."""
    peers = [row["rate_per_s"] for name, row in found.items() if row and name[:4] != "mxn:"]
    if not peers:
        return {}
    return {
        name: round(row["rate_per_s"] / max(peers), 3)
        for name, row in found.items()
        if row and name.startswith("mxn:")
    }


def measure(session: Session, p95_s: float | None, probes: int, until_s: float) -> dict[str, Any]:
    """Run the four steps and return the result."""
    measure_capacity(session)
    measure_parts(session, until_s)
    best = best_peer(session.rows)
    if p95_s is None and best is not None:
        p95_s = session.rows[best][0]["latency_p95_s"]
    result: dict[str, Any] = {
        "capacity": session.capacity, "rows": session.rows, "p95_limit_s": p95_s,
        "limit_from": best, "notes": session.notes,
    }  # fmt: skip
    if p95_s is None:
        session.notes["limit"] = "no peer ran and no --p95 was given: goodput needs a limit"
        return result
    search(session, p95_s, probes, until_s)
    found = {name: goodput(rows, p95_s) for name, rows in session.rows.items()}
    return result | {"goodput": found, "ratios": ratios(found)}


def show(result: dict[str, Any]) -> None:
    for name, row in result.get("goodput", {}).items():
        limit = f"p95 <= {result['p95_limit_s']:.2f} s"
        if row is None:
            print(f"{name}: no rate that was tried keeps {limit}")
            continue
        ratio = result["ratios"].get(name)
        print(
            f"{name}: {row['rate_per_s']:.3g} requests/s at {limit}, "
            f"{row['output_tok_per_s']:.4g} tok/s"
            + (f"; {ratio:.2f}x the best peer's goodput" if ratio is not None else "")
        )
    for name, why in result["notes"].items():
        print(f"{name}: no: {why}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b", help=", ".join(models.SHAPES))
    parser.add_argument("--contenders", default=DEFAULT)
    parser.add_argument("--urls", default="", help="running servers: NAME=MODEL@URL,…")
    parser.add_argument(
        "--p95", type=float, help="allowed p95 latency in s; the best peer's at 70 %%"
    )
    parser.add_argument("--requests", type=int, default=40, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each rate")
    parser.add_argument("--probes", type=int, default=4, help="rates tried for each server")
    parser.add_argument("--slots", type=int, default=16, help="requests at the same time")
    parser.add_argument("--context", type=int, default=512, help="tokens the longest one fills")
    parser.add_argument("--longest", type=int, default=4096, help="longest one kept of the trace")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20, help="no run that would end later")
    parser.add_argument("--turn-limit", type=float, default=100, help="seconds a run may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=Path, help="folder of setup_peers.py; MXN_HOME/peers")
    parser.add_argument("--cache", type=Path, help="folder of the models; MXN_HOME/bench_models")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    return parser.parse_args()


def start(session: Session, arguments: argparse.Namespace, peers: Path, model: Path) -> None:
    """Start all servers; one that cannot is named and left out."""
    sizes = Sizes(arguments.threads, arguments.slots, arguments.context)
    limit_s = arguments.turn_limit
    for name in filter(None, arguments.contenders.split(",")):
        note(f"starting {name}")
        try:
            contender = contenders.find(name)
            session.running[name] = Server.started(contender, model, peers, sizes, limit_s)
        except Failed as error:
            session.notes[name] = str(error)
            note(f"left out: {error}")
    for text in filter(None, arguments.urls.split(",")):
        name, _, where = text.partition("=")
        served, _, url = where.partition("@")
        session.running[name] = Server(name, Target(url, served or MODEL, limit_s), None)


def main() -> None:
    end_on_signal()
    arguments = parse()
    until_s = time.monotonic() + 60 * arguments.minutes
    peers = (arguments.peers or default_folder()).resolve()
    cache = (arguments.cache or models.default_cache()).resolve()
    model = models.ensure(arguments.shape, cache)
    vocab_size = models.SHAPES[arguments.shape]["vocab_size"]
    work = Work(
        arguments.requests, arguments.context, arguments.longest, vocab_size, arguments.seed
    )
    session = Session(work, arguments.slots, repeats=arguments.repeats)
    try:
        start(session, arguments, peers, model)
        result = measure(session, arguments.p95, arguments.probes, until_s)
    finally:
        for server in session.running.values():
            server.stop()
    show(result)
    document = json.dumps(
        {
            "schema": 1, "case": "engine_mixed_load", "basis": "measured", "model": arguments.shape,
            "arrivals": "Poisson", "lengths": traffic.LENGTHS.name,
            "scale": arguments.context / arguments.longest,
            "params": {
                name: value for name, value in vars(arguments).items()
                if name not in ("peers", "cache", "out")
            },
        } | result
    )  # fmt: skip
    if arguments.out:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
