"""mxn and its peers on one processor: the same random model, the same prompts, interleaved.

    python bench/engine/setup_peers.py --peers FOLDER
    python bench/engine/run.py --peers FOLDER --models qwen3-0.6b --quick

Each contender is a process of its own that sleeps (SIGSTOP) while another one has its turn. First
every one of them must be right: logits against float32, or its greedy tokens where it gives no
logits; a wrong one is measured no further, and one that cannot run a model is named with its own
reason. Then, in each round and for each column, all take one turn, and the machine's limits are
measured. Tokens/s are medians over the rounds. Start at `main`.

Round 0 is not counted: it warms up and fills the contexts, 8,192 tokens once. Later rounds find
them filled (llama.cpp and transformers keep a context for each column, the others cache prefixes),
so a round costs only its steps.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import contenders
import limits
import models
import report
from accuracy import STEPS, Accuracy, Made, Steps, Truth
from contenders import Contender
from cost import Shape
from protocol import Failed, Load, Peer, Refused, end_on_signal, prompt
from setup_peers import default_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table; `steps` is 0 for prefill."""

    name: str
    context: int
    batch: int = 1
    steps: int = 0


COLUMNS = (
    Column(name="decode-128", context=128, steps=32),
    Column(name="decode-2048", context=2048, steps=16),
    Column(name="decode-8192", context=8192, steps=8),
    Column(name="prefill-128", context=128),
    Column(name="prefill-512", context=512),
    Column(name="batch-8", context=128, batch=8, steps=8),
    Column(name="batch-16", context=128, batch=16, steps=8),
    Column(name="batch-32", context=128, batch=32, steps=8),
)
START = ("load", "memory")  # measured together, in a fresh process
SLOW_START_S = 60.0  # a contender that took longer once is not started again in later rounds
QUICK = ("decode-128", "prefill-128", "batch-8", "load", "memory")


@dataclass(slots=True)
class Session:
    """One model, its contenders, and what has been measured so far."""

    shape_name: str
    model: Path
    peers: Path
    threads: int
    columns: list[Column]
    wants_start: bool
    logs: Path
    turn_limit_s: float
    running: dict[Contender, Peer] = field(default_factory=dict)
    built: dict[Contender, Path] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    given_up: set[tuple[Contender, str]] = field(default_factory=set)  # contender and column
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    steps: dict[str, Steps] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)  # error of plain rounding of weights
    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def load_of(self, contender: Contender, columns: list[Column]) -> Load:
        longest = max(c.context + c.steps for c in columns) + 64
        room = sum(c.batch * (c.context + c.steps + 64) for c in columns) + 4096
        return self._load(contender, columns, max(1024, longest), room)

    def smallest_load_of(self, contender: Contender, column: Column) -> Load:
        """Room for one sequence and nothing else: engines differ in what they fill at the start."""
        room = -(-(column.context + column.steps + 64) // 256) * 256
        return self._load(contender, [column], room, room)

    def _load(
        self, contender: Contender, columns: list[Column], max_context: int, room: int
    ) -> Load:
        return Load(
            model=str(self.model), built=str(self.built[contender]), weights=contender.weights,
            threads=self.threads, max_context=max_context,
            max_sequences=max(c.batch for c in columns), kv_tokens=room,
        )  # fmt: skip

    def peer(self, contender: Contender, suffix: str = "") -> Peer:
        name = contender.name.replace("/", "-")
        log = self.logs / f"{self.shape_name}-{name}{suffix}.log"
        return contenders.peer(contender, self.peers, self.threads, log, self.turn_limit_s)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def prepare(session: Session, wanted: list[Contender], truth: Truth) -> None:
    """Convert, load and check every contender; the ones that fail are left out with a reason."""
    for contender in wanted:
        peer = session.peer(contender)
        try:
            note(f"{session.shape_name}: loading {contender.name}")
            session.built[contender] = contenders.built(contender, session.model, session.peers)
            answer = peer.load(session.load_of(contender, session.columns))
            session.about[contender.name] = answer["about"]
            found = truth.check(peer, contender.weights)
            session.accuracy[contender.name] = found
            note(f"{contender.name}: {found}")
            if not found.is_right:
                raise Failed(f"wrong: {found}")
        except (Failed, Refused) as error:
            session.notes[contender.name] = str(error)
            note(f"left out: {error}")
            peer.stop()
            continue
        peer.pause(signal.SIGSTOP)
        session.running[contender] = peer
    check_steps(session, truth)


def check_steps(session: Session, truth: Truth) -> None:
    """Leave out contenders whose decoded tokens are wrong: the prompt alone cannot show that."""
    made: Made = {}
    for contender, peer in list(session.running.items()):
        peer.pause(signal.SIGCONT)
        try:
            tokens = peer.ask("greedy", prompt=truth.prompt, steps=STEPS)["tokens"]
            if len(tokens) != STEPS:
                raise Failed(f"it decoded {len(tokens)} tokens, not {STEPS}")
            made[contender.name] = (contender.weights, tokens)
        except Refused as error:
            session.notes[f"{contender.name} steps"] = f"not checked: {error}"
        except Failed as error:
            leave_out(session, contender, str(error))
        finally:
            peer.pause(signal.SIGSTOP)
    found = truth.check_decode(session.model, session.peers, session.threads, made)
    session.steps.update(found)
    for contender in list(session.running):
        steps = found.get(contender.name)
        if steps is not None:
            note(f"{contender.name}: {STEPS} steps, {steps}")
            if not steps.is_right:
                leave_out(session, contender, f"wrong steps: {steps}")


def leave_out(session: Session, contender: Contender, why: str) -> None:
    session.notes[contender.name] = why
    note(f"{contender.name} left out: {why}")
    session.running.pop(contender).stop()


def turn(session: Session, contender: Contender, column: Column, round_number: int) -> None:
    """Let one contender do one column once; round 0 warms up and fills the caches.

    A column that fails is not tried again. Where it ended the process, the other columns go on in a
    fresh one.
    """
    if (contender, column.name) in session.given_up:
        return
    peer = session.running[contender]
    vocab = models.SHAPES[session.shape_name]["vocab_size"]
    peer.pause(signal.SIGCONT)
    try:
        if column.steps:
            seeds = [1000 * column.batch + i for i in range(column.batch)]
            prompts = [prompt(seed, column.context, vocab) for seed in seeds]
            answer = peer.ask("decode", prompts=prompts, steps=column.steps)
            amount = column.batch * column.steps
        else:
            seed = 10**6 + 1000 * round_number + column.context
            answer = peer.ask("prefill", prompt=prompt(seed, column.context, vocab))
            amount = column.context
    except (Failed, Refused) as error:
        session.notes[f"{contender.name} {column.name}"] = str(error)
        session.given_up.add((contender, column.name))
        note(str(error))
        if not peer.is_running:
            restart(session, contender)
        return
    finally:
        peer.pause(signal.SIGSTOP)
    rate = amount / answer["seconds"]
    note(f"round {round_number}, {column.name}: {contender.name} {rate:.4g} tok/s")
    if round_number:
        session.values[column.name][contender.name].append(rate)


def restart(session: Session, contender: Contender) -> None:
    """Load a contender again whose process has ended; leave it out if that fails too."""
    peer = session.running[contender]
    peer.stop()
    try:
        peer.load(session.load_of(contender, session.columns))
    except (Failed, Refused) as error:
        session.notes[contender.name] = str(error)
        note(f"left out: {error}")
        peer.stop()
        del session.running[contender]


def start_turn(session: Session, contender: Contender) -> None:
    """Load to first token and memory, in a fresh process; files are in the page cache.

    Resident pages are counted whole: the proportional part of pages that a paused contender maps
    as well would be too small.
    """
    if any(took > SLOW_START_S for took in session.values["load-spawn"][contender.name]):
        return
    short = Column(name="start", context=128, steps=8)
    peer = session.peer(contender, "-start")
    vocab = models.SHAPES[session.shape_name]["vocab_size"]
    try:
        answer = peer.load(session.smallest_load_of(contender, short))
        peer.ask("decode", prompts=[prompt(1, 128, vocab)], steps=short.steps)
        held = peer.ask("memory")
    except (Failed, Refused) as error:
        session.notes[f"{contender.name} start"] = str(error)
        return
    finally:
        peer.stop()
    values = {
        "load": answer["first_token_s"], "load-spawn": answer["spawn_s"],
        "memory": held["peak_rss_bytes"] / 2**20, "memory-rss": held["rss_bytes"] / 2**20,
    }  # fmt: skip
    for name, value in values.items():
        session.values[name][contender.name].append(value)


def rounds(session: Session, count: int, until_s: float) -> list[limits.Limits]:
    """Run all rounds, or those that begin before `until_s`; returns the limits of each."""
    found = []
    for number in range(count + 1):
        if number > 1 and time.monotonic() > until_s:
            note(f"no time for round {number}")
            break
        if number:
            found.append(limits.measure(session.threads))
            note(f"round {number} of {count}: {found[-1]}")
        for column in session.columns:
            order = list(session.running)  # one that breaks may leave in between
            first = number % max(len(order), 1)  # who begins changes, as does who follows whom
            for contender in order[first:] + order[:first]:
                if contender in session.running:
                    turn(session, contender, column, number)
        if number and session.wants_start:
            for contender in list(session.running):
                start_turn(session, contender)
    return found


def measure(
    session: Session, wanted: list[Contender], count: int, until_s: float
) -> dict[str, Any]:
    """Measure one model and return its part of the result."""
    found: list[limits.Limits] = []
    try:
        truth = Truth.make(session.model, session.peers, session.threads, session.shape_name)
        session.rounding = {f"{bits} bits": error for bits, error in truth.rounding.items()}
        prepare(session, wanted, truth)
        found = rounds(session, count, until_s) if session.running else []
    except (Failed, Refused) as error:  # no truth, nothing to compare with; other models may have
        session.notes["transformers:f32, the truth"] = str(error)
        note(str(error))
    finally:
        for peer in session.running.values():
            peer.pause(signal.SIGCONT)
            peer.stop()
    shape = Shape.of(session.model)
    middle = {
        name: statistics.median(values)
        for name in ("read_gb_per_s", "int8_tops", "fp32_tflops")
        if (values := [v for one in found if (v := getattr(one, name)) is not None])
    }
    return {
        "model": session.shape_name,
        "limits": {"median": middle, "rounds": [asdict(one) for one in found]},
        "accuracy": {name: asdict(one) for name, one in session.accuracy.items()},
        "steps": {name: asdict(one) for name, one in session.steps.items()},
        "rounding_error": session.rounding,
        "metrics": report.quantiles(session.values),
        "limit_fraction": report.fractions(session, shape, middle),
        "about": session.about,
        "notes": session.notes,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [column.name for column in COLUMNS]
    parser.add_argument("--models", default="qwen3-0.6b", help=", ".join(models.SHAPES))
    parser.add_argument("--contenders", default=",".join(contenders.DEFAULT))
    parser.add_argument("--columns", help=f"some of {', '.join((*names, *START))}")
    parser.add_argument("--weights", help="formats of mxn, such as int4,bf16; in place of its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="no new round of a model after")
    parser.add_argument("--turn-limit", type=float, default=600, help="seconds of one request")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--peers", type=Path, help="folder of setup_peers.py; MXN_HOME/peers")
    parser.add_argument("--cache", type=Path, help="folder of the models; MXN_HOME/bench_models")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    return parser.parse_args()


def wanted_contenders(arguments: argparse.Namespace) -> list[Contender]:
    wanted = [contenders.find(name) for name in arguments.contenders.split(",")]
    if arguments.weights:
        ours = [contenders.find(f"mxn:{each}") for each in arguments.weights.split(",")]
        wanted = ours + [one for one in wanted if not one.is_ours]
    return wanted


def main() -> None:
    end_on_signal()
    arguments = parse()
    peers = (arguments.peers or default_folder()).resolve()
    cache = (arguments.cache or models.default_cache()).resolve()
    chosen = arguments.columns.split(",") if arguments.columns else None
    names = chosen or (QUICK if arguments.quick else [*(c.name for c in COLUMNS), *START])
    columns = [column for column in COLUMNS if column.name in names]
    if not columns or set(names) - {column.name for column in COLUMNS} - set(START):
        raise SystemExit(f"columns {names} are not all known, or none is a speed")
    logs = peers / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = []
    for shape in arguments.models.split(","):
        session = Session(
            shape_name=shape, model=models.ensure(shape, cache), peers=peers,
            threads=arguments.threads, columns=columns,
            wants_start=bool(set(names) & set(START)), logs=logs, turn_limit_s=arguments.turn_limit,
        )  # fmt: skip
        until_s = time.monotonic() + 60 * arguments.minutes
        wanted = wanted_contenders(arguments)
        results.append(measure(session, wanted, arguments.rounds, until_s))
        report.show(results[-1])
        params = {"rounds": arguments.rounds, "threads": arguments.threads, "columns": list(names)}
        document = json.dumps(report.document(results, params))
        if arguments.out:  # after each model: the next one may end the run
            arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
