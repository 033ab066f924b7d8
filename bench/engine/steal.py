"""Decode while another process burns one core: what is left, and what should be left.

    python bench/engine/steal.py --contenders mxn:int4,llama.cpp:q4_0 --peers FOLDER

The thief is one busy loop without a pinned core, at the same priority. Of T threads' cores it takes
its fair part: with N cores and T + 1 runnable threads, T threads keep N * T / (T + 1) cores' worth
of time when T = N. Start at `measure`.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contenders
import models
from contenders import Contender
from protocol import Failed, Load, Peer, Refused, prompt
from setup_peers import default_folder

CONTEXT = 128
_BURN = "while True: pass"


def fair_share(cores: int, threads: int) -> float:
    """Return the part of its undisturbed time that `threads` keep beside one busy process.

    A scheduler that is fair to threads gives each of the threads + 1 runnable ones the same.
    """
    busy_before = min(cores, threads)
    busy_after = min(cores, threads + 1)
    return busy_after * threads / (threads + 1) / busy_before


@contextlib.contextmanager
def thief() -> Iterator[None]:
    """Burn one core until the end of the block."""
    child = subprocess.Popen([sys.executable, "-c", _BURN])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def decode(peer: Peer, vocab_size: int, steps: int) -> float:
    """Return tokens/s of one sequence."""
    prompts = [prompt(1, CONTEXT, vocab_size)]
    return steps / peer.ask("decode", prompts=prompts, steps=steps)["seconds"]


def measure(
    running: dict[Contender, Peer], vocab_size: int, rounds: int, steps: int, threads: int
) -> list[dict[str, Any]]:
    """Return undisturbed and disturbed rates, in turns; one pair per round and contender."""
    pairs: dict[Contender, list[tuple[float, float]]] = {one: [] for one in running}
    for _ in range(rounds):
        for contender, peer in running.items():
            peer.pause(signal.SIGCONT)
            quiet = decode(peer, vocab_size, steps)
            with thief():
                pairs[contender].append((quiet, decode(peer, vocab_size, steps)))
            peer.pause(signal.SIGSTOP)
    share = fair_share(len(os.sched_getaffinity(0)), threads)
    rows = []
    for contender, found in pairs.items():
        quiet = statistics.median(pair[0] for pair in found)
        left = statistics.median(pair[1] / pair[0] for pair in found)
        rows.append(
            {
                "contender": contender.name, "tok_per_s": quiet, "left": left,
                "share_allows": share, "of_share": left / share,
            }
        )  # fmt: skip
    return rows


def start(
    names: list[str], model: Path, peers: Path, threads: int, vocab_size: int, steps: int
) -> dict[Contender, Peer]:
    """Load all contenders; one that cannot is named and left out."""
    running = {}
    for name in names:
        contender = contenders.find(name)
        built = contenders.built(contender, model, peers)
        peer = contenders.peer(contender, peers, threads, None)
        load = Load(
            model=str(model), built=str(built), weights=contender.weights, threads=threads,
            max_context=1024, max_sequences=1, kv_tokens=4096,
        )  # fmt: skip
        try:
            peer.load(load)
            decode(peer, vocab_size, steps)  # fills the prompt in and warms up
        except (Failed, Refused) as error:
            print(f"{name}: no: {error}", file=sys.stderr)
            peer.stop()
            continue
        peer.pause(signal.SIGSTOP)
        running[contender] = peer
    return running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", help=", ".join(models.SHAPES))
    parser.add_argument("--contenders", default="mxn:int4-g128,openvino:int4,llama.cpp:q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    peers = (arguments.peers or default_folder()).resolve()
    cache = (arguments.cache or models.default_cache()).resolve()
    model = models.ensure(arguments.model, cache)
    vocab_size = models.SHAPES[arguments.model]["vocab_size"]
    names, steps = arguments.contenders.split(","), arguments.steps
    running = start(names, model, peers, arguments.threads, vocab_size, steps)
    try:
        rows = measure(running, vocab_size, arguments.rounds, steps, arguments.threads)
    finally:
        for peer in running.values():
            peer.pause(signal.SIGCONT)
            peer.stop()
    for row in rows:
        print(
            f"{row['contender']}: {row['tok_per_s']:.1f} tok/s alone, {row['left']:.0%} left beside"
            f" a busy process, where {row['share_allows']:.0%} is fair: {row['of_share']:.0%} of it"
        )
    document = {
        "schema": 1, "case": "engine_steal", "basis": "measured", "model": arguments.model,
        "params": {"threads": arguments.threads, "steps": arguments.steps}, "rows": rows,
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
