"""Decode while another process burns one core: what is left, and what should be left.

    python bench/engine/steal.py --contenders mxn:int4-g128,llama.cpp:q4_0 --peers FOLDER

The thief is one busy loop without a pinned core, at the same priority. Of T threads' cores it takes
its fair part: with N cores and T + 1 runnable threads, T threads keep N * T / (T + 1) cores' worth
of time when T = N. `of_share` is what is left of the undisturbed rate divided by that fair part; a
goal of 0.8 is met at 0.8 and above. `thief_cores` is what the thief really got: an engine whose
threads sleep while they wait gives away more than the fair part. Start at `measure`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import models
from contenders import Contender
from protocol import Failed, Load, Peer, Refused, end_on_signal, prompt
from setup_peers import default_folder

DEFAULT = "mxn:int4-g128,mxn:int8,openvino:int8,openvino:int4,llama.cpp:q4_0"
CONTEXT = 128
STARTING_S = 0.2  # until Python burns and the scheduler has moved threads
_BURN = "while True: pass"


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens/s alone and beside a thief, and the cores that the thief got."""

    quiet: float
    disturbed: float
    thief_cores: float


def fair_share(cores: int, threads: int) -> float:
    """Return the part of its undisturbed time that `threads` keep beside one busy process.

    A scheduler that is fair to threads gives each of the threads + 1 runnable ones the same.
    """
    busy_before = min(cores, threads)
    busy_after = min(cores, threads + 1)
    return busy_after * threads / (threads + 1) / busy_before


@contextlib.contextmanager
def thief() -> Iterator[int]:
    """Burn one core until the end of the block; gives the process's id."""
    child = subprocess.Popen([sys.executable, "-c", _BURN])
    try:
        time.sleep(STARTING_S)
        yield child.pid
    finally:
        child.kill()
        child.wait()


def cpu_s(process_id: int) -> float:
    """Return the processor time of a process so far, in s."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def decode(peer: Peer, vocab_size: int, steps: int) -> float:
    """Return tokens/s of one sequence."""
    prompts = [prompt(1, CONTEXT, vocab_size)]
    return steps / peer.ask("decode", prompts=prompts, steps=steps)["seconds"]


def pair(peer: Peer, vocab_size: int, steps: int) -> Pair:
    """Decode alone, then beside a thief. Raises: Failed, Refused."""
    quiet = decode(peer, vocab_size, steps)
    with thief() as process_id:
        before_s, started_s = cpu_s(process_id), time.perf_counter()
        disturbed = decode(peer, vocab_size, steps)
        taken = (cpu_s(process_id) - before_s) / (time.perf_counter() - started_s)
    return Pair(quiet, disturbed, taken)


def measure(
    running: dict[Contender, Peer], vocab_size: int, rounds: int, steps: int, until_s: float
) -> tuple[dict[Contender, list[Pair]], dict[str, str]]:
    """Return the pairs of each contender, taken in turns, and why one has none or fewer."""
    pairs: dict[Contender, list[Pair]] = {one: [] for one in running}
    notes: dict[str, str] = {}
    for number in range(rounds):
        if number and time.monotonic() > until_s:
            notes["rounds"] = f"{number} of {rounds}: the minutes were over"
            break
        for contender, peer in running.items():
            if contender.name in notes:
                continue
            peer.pause(signal.SIGCONT)
            try:
                pairs[contender].append(pair(peer, vocab_size, steps))
            except (Failed, Refused) as error:
                notes[contender.name] = str(error)
            peer.pause(signal.SIGSTOP)
    return pairs, notes


def rows(pairs: dict[Contender, list[Pair]], cores: int, threads: int) -> list[dict[str, Any]]:
    """Return medians: the rate alone, what is left of it, and its part of the fair share."""
    share = fair_share(cores, threads)
    found = []
    for contender, each in pairs.items():
        if not each:
            continue
        left = statistics.median(one.disturbed / one.quiet for one in each)
        found.append(
            {
                "contender": contender.name, "rounds": len(each),
                "tok_per_s": round(statistics.median(one.quiet for one in each), 3),
                "disturbed_tok_per_s": round(statistics.median(one.disturbed for one in each), 3),
                "left": round(left, 4), "share_allows": round(share, 4),
                "of_share": round(left / share, 4),
                "thief_cores": round(statistics.median(one.thief_cores for one in each), 3),
            }
        )  # fmt: skip
    return found


def start(
    arguments: argparse.Namespace, model: Path, peers: Path, vocab_size: int
) -> tuple[dict[Contender, Peer], dict[str, str]]:
    """Load all contenders; one that cannot is named and left out."""
    running, notes = {}, {}
    for name in arguments.contenders.split(","):
        contender = contenders.find(name)
        peer = contenders.peer(contender, peers, arguments.threads, None, arguments.turn_limit)
        try:
            load = Load(
                model=str(model), built=str(contenders.built(contender, model, peers)),
                weights=contender.weights, threads=arguments.threads, max_context=1024,
                max_sequences=1, kv_tokens=4096,
            )  # fmt: skip
            peer.load(load)
            decode(peer, vocab_size, arguments.steps)  # fills the prompt in and warms up
        except (Failed, Refused) as error:
            notes[name] = str(error)
            peer.stop()
            continue
        peer.pause(signal.SIGSTOP)
        running[contender] = peer
    return running, notes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", help=", ".join(models.SHAPES))
    parser.add_argument("--contenders", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=96, help="tokens of one measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5, help="no new round after")
    parser.add_argument("--turn-limit", type=float, default=120, help="seconds of one measurement")
    parser.add_argument("--peers", type=Path, help="folder of setup_peers.py; MXN_HOME/peers")
    parser.add_argument("--cache", type=Path, help="folder of the models; MXN_HOME/bench_models")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    return parser.parse_args()


def main() -> None:
    end_on_signal()
    arguments = parse()
    until_s = time.monotonic() + 60 * arguments.minutes
    peers = (arguments.peers or default_folder()).resolve()
    cache = (arguments.cache or models.default_cache()).resolve()
    model = models.ensure(arguments.model, cache)
    vocab_size = models.SHAPES[arguments.model]["vocab_size"]
    running, notes = start(arguments, model, peers, vocab_size)
    try:
        pairs, more = measure(running, vocab_size, arguments.rounds, arguments.steps, until_s)
    finally:
        for peer in running.values():
            peer.pause(signal.SIGCONT)
            peer.stop()
    found = rows(pairs, len(os.sched_getaffinity(0)), arguments.threads)
    for row in found:
        print(
            f"{row['contender']}: {row['tok_per_s']:.1f} tok/s alone, {row['left']:.0%} left beside"
            f" a busy process (it got {row['thief_cores']:.2f} cores), where"
            f" {row['share_allows']:.0%} is fair: {row['of_share']:.0%} of it"
        )
    for name, why in (notes | more).items():
        print(f"{name}: no: {why.splitlines()[0]}")
    params = {name: getattr(arguments, name) for name in ("threads", "steps", "rounds")}
    document = json.dumps(
        {
            "schema": 1, "case": "engine_steal", "basis": "measured", "model": arguments.model,
            "params": params, "rows": found, "notes": notes | more,
        }
    )  # fmt: skip
    if arguments.out:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
