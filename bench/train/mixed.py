"""One job over ranks of different speeds: its throughput against the sum of what each does alone.

    python bench/train/mixed.py [--mixes 1:0.5,1:0.25,0.6:0.3:0.3:0.15] [--steps 10] [--rounds 2]

A rank is a process whose share of a core is limited by a cgroup quota, so the chips are emulated
and the figures are `simulated`; ranks, messages, gradients and contention are real. For each mix,
everything is measured in the same minutes, in an order that is turned round in every second round:

- *solo*: each speed alone with the whole job. The sum over the ranks is the bound U.
- *together*: all ranks at the same time, each alone with a whole job on the core that it has in the
  mix. Cores of one machine share caches and memory, chips do not: what a rank loses here by its
  neighbours it loses in any mix. R beside = throughput / sum of these.
- *best*: what the planner chooses, with micro-batches shared out again by what the steps measure;
  the first steps, in which it settles, are not counted. R = its throughput / U.
- *planned*: the same without sharing out again.
- *uniform*: each rank the same number of micro-batches.
- *pipeline*: one pipeline over all ranks, cut by their speeds.

U' is the stricter bound: micro-batches and optimizer as fast as in the solo runs while they compute
there, without any waiting, summing or bookkeeping. Prediction error: the simulated step against the
measured one, from a profile taken just before, for the counts of the last step. Needs cgroups that
may be written. Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mixed_report import show, summary

from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run import counts_log
from mxn.train.run.rebalance import counts_text, with_counts

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "recipes/data/tinyshakespeare.txt"
MODEL = "mxn-shakespeare-llama"
SKIPPED = 2  # steps at the start of a run that are not counted
SETTLING = 14  # steps more of a run whose micro-batches are shared out again: two decisions
NUM_LAYERS = 6  # of the model: embedding, four blocks, head


@dataclass(slots=True)
class Mix:
    """One mix, and the seconds of every step that was counted, by variant."""

    shares: tuple[float, ...]
    folder: Path
    rows: int
    seq_tokens: int
    steps: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, list[float]] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    beside: dict[int, list[float]] = field(default_factory=dict)  # seconds of steps, by rank

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_tokens

    def num_counted(self, name: str) -> int:
        counted = self.steps - SKIPPED  # a solo step takes several times as long as a mixed one
        return counted // 2 if name.startswith("solo") else counted

    def num_steps(self, name: str) -> int:
        return SKIPPED + self.num_counted(name) + (SETTLING if name == "best" else 0)

    def job(
        self, name: str, shares: tuple[float, ...], plan: Path | None, *, steps: int | None = None
    ) -> Path:
        """Write the job of a variant and return its file."""
        devices = [
            {"name": f"r{number}", "device": "cpu", "cpu_share": share, "pin": True}
            for number, share in enumerate(shares)
        ]
        told = {
            "name": name, "model": {"source": MODEL, "begin": "scratch"}, "method": "pretrain",
            "data": {"files": [str(TEXT)]}, "seq_tokens": self.seq_tokens, "micro_batch": 1,
            "global_batch": self.rows, "steps": steps or self.num_steps(name), "devices": devices,
            "rebalance": name == "best",
            "checkpoint": {"every_steps": 10**6}, "gate": {"speed": "ignore"},
            "out": str(self.folder / name),
        }  # fmt: skip
        if plan is not None:
            told["plan"] = {"file": str(plan)}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(told))
        return path


def mxn(*words: str | Path) -> str:
    """Run a command of mxn and return its output. Raises: SystemExit with what it said."""
    code = "from mxn.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"mxn {' '.join(map(str, words))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def variants(mix: Mix) -> dict[str, tuple[tuple[float, ...], TrainPlan | None]]:
    """Return what is run: shares, and the plan where the planner does not choose it."""
    solos: dict[str, tuple[tuple[float, ...], TrainPlan | None]] = {
        f"solo-{share:g}": ((share,), None) for share in sorted(set(mix.shares), reverse=True)
    }
    return solos | {
        "best": (mix.shares, None),
        "planned": (mix.shares, None),
        "uniform": (mix.shares, uniform(mix)),
        "pipeline": (mix.shares, pipeline(mix)),
    }


def uniform(mix: Mix) -> TrainPlan:
    count = len(mix.shares)
    even = [mix.rows // count + (number < mix.rows % count) for number in range(count)]
    whole = (Chunk(first=0, end=NUM_LAYERS),)
    pipelines = tuple(
        Pipeline(
            stages=(Stage(group=f"r{number}", first_device=0, chunks=whole),), micro_batches=rows
        )
        for number, rows in enumerate(even)
    )
    return plan_of(mix, pipelines)


def pipeline(mix: Mix) -> TrainPlan:
    """Cut layers over all ranks, one block as one unit, a head as 0.7, by largest remainder."""
    order = sorted(range(len(mix.shares)), key=lambda number: -mix.shares[number])
    weights = [0.01, 1.0, 1.0, 1.0, 1.0, 0.6]  # embedding, blocks, head: of the profile
    total, cuts, at = sum(weights), [0], 0.0
    shares = [mix.shares[number] for number in order]
    for position in range(len(order) - 1):
        at += shares[position] / sum(shares) * total
        nearest = min(
            range(cuts[-1] + 1, NUM_LAYERS - (len(order) - 2 - position)),
            key=lambda cut: abs(sum(weights[:cut]) - at),
        )
        cuts.append(nearest)
    cuts.append(NUM_LAYERS)
    stages = tuple(
        Stage(
            group=f"r{number}", first_device=0,
            chunks=(Chunk(first=cuts[position], end=cuts[position + 1]),),
        )
        for position, number in enumerate(order)
    )  # fmt: skip
    return plan_of(mix, (Pipeline(stages=stages, micro_batches=mix.rows),))


def plan_of(mix: Mix, pipelines: tuple[Pipeline, ...]) -> TrainPlan:
    plan = TrainPlan(
        model=MODEL, num_layers=NUM_LAYERS, seq_tokens=mix.seq_tokens, micro_batch=1,
        pipelines=pipelines,
    )  # fmt: skip
    plan.check()
    return plan


def measure(mix: Mix, name: str, shares: tuple[float, ...], plan: TrainPlan | None) -> None:
    """Profile, run, and keep the steps of one variant."""
    path = None
    if plan is not None:
        path = mix.folder / f"{name}.plan.json"
        path.write_text(plan.to_json())
    shutil.rmtree(mix.folder / name, ignore_errors=True)
    job = mix.job(name, shares, path)
    mxn("train", "profile", job, "--fresh", "--json")
    mxn("train", "run", job, "--json")
    out = mix.folder / name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    mix.plans[name] = settled(out, TrainPlan.from_json((out / "plan.json").read_text()))
    counted = rows[mix.num_steps(name) - mix.num_counted(name) :]
    mix.seconds.setdefault(name, []).extend(row["seconds"] for row in counted)
    busy = [row["rank0_busy_s"] for row in counted]
    mix.busy.setdefault(name, []).extend(busy)
    predicted = json.loads((out / "predicted.json").read_text())["prediction"]["iteration_s"]
    mix.predicted.setdefault(name, []).append(predicted)
    middle = statistics.median(row["seconds"] for row in counted)
    note(f"  {name}: {middle:.3f} s a step, predicted {predicted:.3f}, {mix.plans[name]}")


def measure_together(mix: Mix) -> None:
    """Run every rank alone, all at the same time, and keep the steps while all of them ran."""
    medians = [statistics.median(mix.seconds[f"solo-{share:g}"]) for share in mix.shares]
    slowest_s = max(medians)
    lasts_s = (1 + mix.num_counted("solo")) * slowest_s  # the first step of each warms up
    running: list[subprocess.Popen[bytes]] = []
    for number, (share, step_s) in enumerate(zip(mix.shares, medians, strict=True)):
        # Quicker ranks go on a little longer, so that no step of the slowest is without company.
        steps = round((lasts_s + (_STARTS_APART_S if step_s < slowest_s else 0)) / step_s)
        shutil.rmtree(mix.folder / f"together-{number}", ignore_errors=True)
        job = mix.job(f"together-{number}", (share,), None, steps=steps)
        cores = sorted(os.sched_getaffinity(0))
        command = [sys.executable, "-c", _ON_CORE, str(cores[number % len(cores)]), "train", "run"]
        running.append(subprocess.Popen([*command, str(job)], stderr=subprocess.DEVNULL))
    for process in running:
        if process.wait():
            raise SystemExit("a job beside others ended with an error")
    spans = [_spans(mix.folder / f"together-{number}") for number in range(len(running))]
    begin_s = max(rank[1][0] for rank in spans)
    end_s = min(rank[-1][1] for rank in spans)
    for number, rank in enumerate(spans):
        inside = [
            end - start for start, end in rank if start >= begin_s - 0.5 and end <= end_s + 0.5
        ]
        if not inside:
            raise SystemExit(f"no step of rank {number} lies where all ran: more --steps")
        mix.beside.setdefault(number, []).extend(inside)
        middle = statistics.median(inside)
        note(f"  together, rank {number}: {middle:.3f} s a step, {len(inside)} of them")


_STARTS_APART_S = 8.0  # between the first and the last of jobs that are started at once

_ON_CORE = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv.pop(1))})
from mxn.cli.main import main
main()
"""


def _spans(out: Path) -> list[tuple[float, float]]:
    """Return begin and end of each step in seconds since 1970: the last ended as it was written."""
    path = out / "metrics.jsonl"
    end_s, found = path.stat().st_mtime, []
    for line in reversed(path.read_text().splitlines()):
        seconds = json.loads(line)["seconds"]
        found.append((end_s - seconds, end_s))
        end_s -= seconds
    return found[::-1]


def settled(out: Path, plan: TrainPlan) -> str:
    """Return the plan with the counts of the last step, in words."""
    changes = counts_log.read(out, plan.fingerprint)
    if not changes:
        return brief(plan)
    if changes[-1].step > SKIPPED + SETTLING:
        note(f"  not settled: {changes[-1].text()}")
    planned = counts_text(changes[0].before)
    return f"{brief(with_counts(plan, changes[-1].after))} (planned {planned})"


def brief(plan: TrainPlan) -> str:
    """Say a plan in a few letters: layers of each stage, and micro-batches of each pipeline."""
    parts = []
    for pipe in plan.pipelines:
        stages = " > ".join(f"{stage.group}:{stage.num_layers}L" for stage in pipe.stages)
        parts.append(f"{stages} x {pipe.micro_batches}")
    return f"{plan.schedule}: {'; '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixes", default="1:0.5,1:0.25,0.6:0.3:0.3:0.15")
    parser.add_argument("--steps", type=int, default=10, help=f"of a run; {SKIPPED} not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=96, help="of a step; a micro-batch is one")
    parser.add_argument("--seq-tokens", type=int, default=128)
    parser.add_argument("--variants", default="best,planned,uniform,pipeline", help="besides solo")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MXN_HOME"] = f"{scratch}/home"
        for text in options.mixes.split(","):
            shares = tuple(float(share) for share in text.split(":"))
            folder = Path(scratch) / text.replace(":", "-")
            folder.mkdir()
            mix = Mix(shares, folder, options.rows, options.seq_tokens, options.steps)
            asked = options.variants.split(",")
            wanted = [
                (name, variant)
                for name, variant in variants(mix).items()
                if name.startswith("solo") or name in asked
            ]
            for number in range(options.rounds):
                note(f"mix {text}, round {number + 1} of {options.rounds}")
                for name, (ranks, plan) in wanted[:: -1 if number % 2 else 1]:
                    measure(mix, name, ranks, plan)
                measure_together(mix)
            results.append(summary(mix))
            show(results[-1])
    document = json.dumps(
        {
            "schema": 1, "case": "train_mixed", "basis": "simulated",
            "note": "speeds are CPU shares by cgroup quota", "model": MODEL,
            "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "params": {
                "steps": options.steps, "rounds": options.rounds, "rows": options.rows,
                "seq_tokens": options.seq_tokens,
            },
            "mixes": results,
        }
    )  # fmt: skip
    if options.out:
        options.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
