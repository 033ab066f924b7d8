"""One job over ranks of different speeds: its throughput against the sum of what each does alone.

    python bench/train/mixed.py [--mixes 1:0.5,1:0.25,0.6:0.3:0.3:0.15] [--cycles 20]

A rank is a process whose share of a core is limited by a cgroup quota, so the chips are emulated
and the figures are `simulated`; ranks, messages, gradients and contention are real. The speed of a
machine with unknown neighbours changes by a tenth within seconds, so everything is compared in
turns: all jobs of a mix are started once and stopped (`paused.py`), and in each cycle some whole
steps are run of

- *solo*, each rank alone. The sum of their rates is the bound U of the cycle. A solo job has fewer
  rows a step, or a step of a slow rank would take a minute; what it does once a step is counted as
  in a step of all rows.
- *together*: the solo jobs at the same time, each on the core that it has in the mix. Cores of one
  machine share caches and memory, chips do not: what a rank loses here by its neighbours it loses
  in any mix. R beside = throughput / sum of these.
- *best*: what the planner chooses, with micro-batches shared out again by what the steps measure,
  and 15 % of them open to who gets to them first. R = its throughput / U.
- in every second cycle one of *settled*: the same without open ones; *planned*: nor shared out
  again; *uniform*: each rank the same number of micro-batches; *pipeline*: one pipeline over all
  ranks, cut by their speeds.

U' is the stricter bound: only what the ranks compute alone, without updates and bookkeeping.
*Reached* needs no other run: throughput over the sum of what the ranks computed at in the same
steps, so the host's changes are not in it; waiting, sums and updates are. Every few cycles the
devices are profiled anew, and each plan's predicted step is compared with the measured one. Rates
are of mean times over cycles, with the standard error of R. Needs cgroups that may be written.
Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import mixed_jobs
from mixed_jobs import Mix, brief, plan_of, work_of
from mixed_report import Alone, Cycle, Run, show, summary
from paused import PausedJob, Window, together

from mxn.train.plan.plan import TrainPlan
from mxn.train.run.job_file import read_job
from mxn.train.run.launch import cores_of
from mxn.train.run.prepare import task_of_job

SKIPPED = 2  # steps at the start of a run that are not counted
PROFILED_S = 30.0  # at most; a step of the mix is measured for 20
SETTLING = 14  # steps more of a run whose micro-batches are shared out again: two decisions
OTHERS = ("uniform", "pipeline", "settled", "planned")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def profile(mix: Mix) -> None:
    """Measure the ranks again, all at the same time, and keep it for the next prediction."""
    code = "from mxn.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "profile", str(mix.out("best.yaml"))]
    command += ["--fresh", "--seconds", f"{PROFILED_S:g}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mxn train profile:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


class Bench:
    """The jobs of a mix, each stopped but when it is measured."""

    def __init__(
        self, mix: Mix, others: tuple[str, ...], *, window_s: float, profile_every: int
    ) -> None:
        self.mix, self.others = mix, others
        self.window_s, self.profile_every = window_s, profile_every
        self._ended = ExitStack()
        self.jobs: dict[str, PausedJob] = {}
        self.cycles: list[Cycle] = []

    def __enter__(self) -> Bench:
        try:
            self._start_all()
        except BaseException:
            self._ended.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    def _start_all(self) -> None:
        mix, cores = self.mix, sorted(os.sched_getaffinity(0))
        best = mix.job("best")
        wanted = cores_of(read_job(best).devices)
        profile(mix)
        self._start("best", best, None, SKIPPED + SETTLING // 2)
        plans = {
            "settled": plan_of_start(mix), "planned": plan_of_start(mix),
            "uniform": mixed_jobs.uniform(mix), "pipeline": mixed_jobs.pipeline(mix),
        }  # fmt: skip
        for name in self.others:
            ready = SKIPPED + (SETTLING if name == "settled" else 0)
            self._start(name, mix.job(name, plans[name]), None, ready)
        for number in range(len(mix.shares)):
            core = min(wanted[number] or cores)
            self._start(f"solo-{number}", mix.solo(number), core, SKIPPED)

    def _start(self, name: str, file: Path, core: int | None, ready: int) -> None:
        begun_s = time.perf_counter()
        job = PausedJob(file, self.mix.out(name), core=core)
        self._ended.callback(job.end)
        job.wait_for(ready)
        job.free()
        job.pause()
        self.jobs[name] = job
        note(f"  {name}: {brief(plan_of(job.out))}, ready in {time.perf_counter() - begun_s:.0f} s")

    def cycle(self, number: int) -> None:
        """Measure the ranks alone, what is compared with them, and the ranks together."""
        solos = [f"solo-{rank}" for rank in range(len(self.mix.shares))]
        runs = ["best", *self._other(number)]
        turns = [*solos[::2], *runs, *solos[1::2]]
        windows: dict[str, Window] = {}
        for name in turns[:: -1 if number % 2 else 1]:
            windows[name] = self.jobs[name].window(self.window_s, 3 if name == "best" else 2)
        alone = [Alone.of(windows[name], self.mix) for name in solos]
        jobs = [self.jobs[name] for name in solos]
        beside = together(jobs, [one.step_s for one in alone], self.window_s)
        is_predicted = number % self.profile_every == 0
        if is_predicted:
            profile(self.mix)
        found: dict[str, Run] = {}
        for name in runs:
            plan = plan_of(self.mix.out(name))
            predicted_s = self._predict(name, plan) if is_predicted else None
            found[name] = Run.of(windows[name], work_of(plan), brief(plan), predicted_s)
        cycle = Cycle(
            alone=alone, beside=[Alone.of(window, self.mix) for window in beside], runs=found
        )
        self.cycles.append(cycle)
        note(f"  cycle {number + 1}: {cycle.text(self.mix)}")

    def _other(self, number: int) -> list[str]:
        """Return the plan that is measured besides the best one, in every second cycle."""
        if number % 2 or not self.others:
            return []
        return [self.others[number // 2 % len(self.others)]]

    def _predict(self, name: str, plan: TrainPlan) -> float:
        """Return what a step of a job takes by the profile, and by what that job leaves open."""
        return task_of_job(read_job(self.mix.out(f"{name}.yaml"))).predict(plan).iteration_s


def plan_of_start(mix: Mix) -> TrainPlan:
    """Return the plan that the planner chose, before its micro-batches were shared out again."""
    return TrainPlan.from_json((mix.out("best") / "plan.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixes", default="1:0.5,1:0.25,0.6:0.3:0.3:0.15")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--window", type=float, default=12.0, help="seconds of one, at least")
    parser.add_argument("--profile-every", type=int, default=2, help="cycles")
    parser.add_argument("--rows", type=int, default=288, help="of a step; a micro-batch is one")
    parser.add_argument("--solo-rows", type=int, default=48, help="of a step of one rank alone")
    parser.add_argument("--seq-tokens", type=int, default=128)
    parser.add_argument("--others", default=",".join(OTHERS), help="besides best, one in a cycle")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    options = parser.parse_args()
    others = tuple(filter(None, options.others.split(",")))
    if unknown := set(others) - set(OTHERS):
        parser.error(f"--others: no {', '.join(sorted(unknown))}; there are {', '.join(OTHERS)}")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MXN_HOME"] = f"{scratch}/home"
        for text in options.mixes.split(","):
            shares = tuple(float(share) for share in text.split(":"))
            folder = Path(scratch) / text.replace(":", "-")
            folder.mkdir()
            mix = Mix(
                shares=shares, folder=folder, rows=options.rows, solo_rows=options.solo_rows,
                seq_tokens=options.seq_tokens,
            )  # fmt: skip
            note(f"mix {mix.text}")
            with Bench(
                mix, others, window_s=options.window, profile_every=options.profile_every
            ) as bench:
                for number in range(options.cycles):
                    bench.cycle(number)
                results.append(summary(mix, bench.cycles))
            show(results[-1])
    document = json.dumps(
        {
            "schema": 2, "case": "train_mixed", "basis": "simulated",
            "note": "speeds are CPU shares by cgroup quota", "model": mixed_jobs.MODEL,
            "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "params": {
                name: getattr(options, name)
                for name in ("cycles", "window", "rows", "solo_rows", "seq_tokens")
            },
            "mixes": results,
        }
    )  # fmt: skip
    if options.out:
        options.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
