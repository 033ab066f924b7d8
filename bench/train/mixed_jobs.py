"""What `mixed.py` runs: the jobs of a mix, and the plans that people would make by hand.

Start at `Mix`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run import counts_log
from mxn.train.run.rebalance import with_counts

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "recipes/data/tinyshakespeare.txt"
MODEL = "mxn-shakespeare-llama"
NUM_LAYERS = 6  # of the model: embedding, four blocks, head
WORK = (0.01, 1.0, 1.0, 1.0, 1.0, 0.6)  # of these layers, in blocks, by their profile
_ENDLESS = 10**6  # steps: a job runs until it has been measured often enough
_REBALANCE: dict[str, object] = {
    "best": {"open_share": 0.15},
    "settled": True,
    "kept": {"open_share": 0.15, "every_steps": _ENDLESS},  # the counts of the plan for ever
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Ranks of different speeds and the job that they share."""

    shares: tuple[float, ...]
    folder: Path
    rows: int
    solo_rows: int
    seq_tokens: int

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.rows * self.seq_tokens

    @property
    def text(self) -> str:
        return ":".join(f"{share:g}" for share in self.shares)

    def out(self, name: str) -> Path:
        return self.folder / name

    def job(self, name: str, plan: TrainPlan | None = None) -> Path:
        """Write the job of all ranks with a plan (None: the planner's), and return its file."""
        return self._write(name, self.shares, self.rows, plan)

    def solo(self, number: int) -> Path:
        """Write the job of one rank alone, and return its file."""
        return self._write(f"solo-{number}", (self.shares[number],), self.solo_rows, None)

    def _write(
        self, name: str, shares: tuple[float, ...], rows: int, plan: TrainPlan | None
    ) -> Path:
        devices = [
            {"name": f"r{number}", "device": "cpu", "cpu_share": share, "pin": True}
            for number, share in enumerate(shares)
        ]
        told = {
            "name": name, "model": {"source": MODEL, "begin": "scratch"}, "method": "pretrain",
            "data": {"files": [str(TEXT)]}, "seq_tokens": self.seq_tokens, "micro_batch": 1,
            "global_batch": rows, "steps": _ENDLESS, "devices": devices,
            "rebalance": _REBALANCE.get(name, False), "checkpoint": {"every_steps": _ENDLESS},
            "gate": {"speed": "ignore"},
            "faults": {"stall_s": 36_000},  # a stopped job is none that stalls
            "out": str(self.out(name)),
        }  # fmt: skip
        if plan is not None:
            file = self.folder / f"{name}.plan.json"
            file.write_text(plan.to_json())
            told["plan"] = {"file": str(file)}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(told))
        return path


def uniform(mix: Mix) -> TrainPlan:
    """Give every rank the whole model and as many micro-batches as the others."""
    count = len(mix.shares)
    even = [mix.rows // count + (number < mix.rows % count) for number in range(count)]
    whole = (Chunk(first=0, end=NUM_LAYERS),)
    pipelines = tuple(
        Pipeline(
            stages=(Stage(group=f"r{number}", first_device=0, chunks=whole),), micro_batches=rows
        )
        for number, rows in enumerate(even)
    )
    return _plan(mix, pipelines)


def pipeline(mix: Mix) -> TrainPlan:
    """Cut layers over all ranks, one block as one unit, a head as 0.6, by largest remainder."""
    order = sorted(range(len(mix.shares)), key=lambda number: -mix.shares[number])
    total, cuts, at = sum(WORK), [0], 0.0
    shares = [mix.shares[number] for number in order]
    for position in range(len(order) - 1):
        at += shares[position] / sum(shares) * total
        nearest = min(
            range(cuts[-1] + 1, NUM_LAYERS - (len(order) - 2 - position)),
            key=lambda cut: abs(sum(WORK[:cut]) - at),
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
    return _plan(mix, (Pipeline(stages=stages, micro_batches=mix.rows),))


def _plan(mix: Mix, pipelines: tuple[Pipeline, ...]) -> TrainPlan:
    plan = TrainPlan(
        model=MODEL, num_layers=NUM_LAYERS, seq_tokens=mix.seq_tokens, micro_batch=1,
        pipelines=pipelines,
    )  # fmt: skip
    plan.check()
    return plan


def plan_of(out: Path) -> TrainPlan:
    """Return the plan that a job runs, with the counts of its last step."""
    plan = TrainPlan.from_json((out / "plan.json").read_text())
    changes = counts_log.read(out, plan.fingerprint)
    return with_counts(plan, changes[-1].after) if changes else plan


def work_of(plan: TrainPlan) -> list[float]:
    """Return the part of a step's work that each rank does, in the order of ranks."""
    work = [
        pipe.micro_batches * sum(sum(WORK[chunk.first : chunk.end]) for chunk in stage.chunks)
        for pipe in plan.pipelines
        for stage in pipe.stages
    ]
    return [part / sum(work) for part in work]


def brief(plan: TrainPlan) -> str:
    """Say a plan in a few letters: layers of each stage, and micro-batches of each pipeline."""
    parts = []
    for pipe in plan.pipelines:
        stages = " > ".join(f"{stage.group}:{stage.num_layers}L" for stage in pipe.stages)
        parts.append(f"{stages} x {pipe.micro_batches}")
    return f"{plan.schedule}: {'; '.join(parts)}"
