"""Is a step of mixed ranks predicted right? Profile and jobs take turns of some seconds.

    python bench/train/predicted.py [--mixes 1:0.5,1:0.25] [--turns 12] [--out FILE]

`mixed.py` profiles between its cycles, and on a machine whose speed changes by the second a profile
and a step that lie a minute apart differ by more than what is asked of a prediction. Here they are
let run in turns, so that they meet the same machine: jobs by whole steps, and a measurement of the
same ranks (`mxn train profile`), stopped in between; it leaves out blocks with a stop in them.

*kept* is the planner's plan with open micro-batches, its counts as planned: a job would learn from
steps with a stop in them. *uniform* and *pipeline* are those of `mixed.py`. Errors of steps are
standard errors over turns. Ranks are limited by cgroup quota, so `simulated`. Start at `judge`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mixed_jobs
from mixed_jobs import MODEL, Mix, brief, plan_of
from paused import PausedJob, signal_tree, tree_of

from mxn.train.run.job_file import read_job
from mxn.train.run.prepare import task_of_job

IMPORTS_S = 16.0  # until the ranks of a measurement have begun
WARM_STEPS = 4  # memory is taken, caches fill
_END_S = 30.0
_MAIN = "from mxn.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixes", default="1:0.5,1:0.25,0.6:0.3:0.3:0.15")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--turn", type=float, default=6.0, help="seconds of each, at least")
    parser.add_argument("--rows", type=int, default=144, help="of a step; a micro-batch is one")
    parser.add_argument("--out", type=Path, help="write all results here, as JSON")
    options = parser.parse_args()
    runs = []
    for text in options.mixes.split(","):
        runs.append(judge(text, options.rows, options.turns, options.turn))
        print(json.dumps(runs[-1]), flush=True)
    if options.out is not None:
        told = {
            "schema": 1, "case": "train_predicted", "basis": "simulated",
            "note": "speeds are CPU shares by cgroup quota; 15 % open micro-batches",
            "model": MODEL, "machine": platform.machine(), "cores": os.cpu_count(),
            "params": {"turns": options.turns, "turn_s": options.turn, "rows": options.rows},
            "runs": runs,
        }  # fmt: skip
        options.out.write_text(json.dumps(told, indent=1) + "\n")


def judge(text: str, rows: int, turns: int, turn_s: float) -> dict[str, object]:
    """Let jobs of a mix and a measurement of its ranks take turns; return what is compared."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ended:
        os.environ["MXN_HOME"] = f"{scratch}/home"
        shares = tuple(float(share) for share in text.split(":"))
        mix = Mix(
            shares=shares, folder=Path(scratch), rows=rows, solo_rows=rows, seq_tokens=128
        )  # fmt: skip
        files = {
            "kept": mix.job("kept"),
            "uniform": mix.job("uniform", mixed_jobs.uniform(mix)),
            "pipeline": mix.job("pipeline", mixed_jobs.pipeline(mix)),
        }
        jobs = {}
        for name, file in files.items():
            jobs[name] = PausedJob(file, mix.out(name))
            ended.callback(jobs[name].end)
            jobs[name].wait_for(WARM_STEPS)
            jobs[name].pause()
        took = in_turns(jobs, files["kept"], turns, turn_s)
        runs = {name: compare(file, jobs[name], took[name]) for name, file in files.items()}
    return {"mix": text, "runs": runs}


def compare(file: Path, job: PausedJob, steps_s: list[float]) -> dict[str, object]:
    """Return the mean of a job's steps over turns, and what the profile says of one."""
    step_s, plan = statistics.fmean(steps_s), plan_of(job.out)
    told_s = task_of_job(read_job(file)).predict(plan).iteration_s
    return {
        "plan": brief(plan), "turns": len(steps_s), "step_s": round(step_s, 4),
        "step_error": round(statistics.stdev(steps_s) / len(steps_s) ** 0.5 / step_s, 4),
        "predicted_s": round(told_s, 4), "error": round(told_s / step_s - 1, 4),
    }  # fmt: skip


def in_turns(
    jobs: dict[str, PausedJob], file: Path, turns: int, turn_s: float
) -> dict[str, list[float]]:
    """Measure the ranks of a job anew between the steps of all; return seconds a step by turn."""
    once_s = sum(job.window(turn_s, 1).seconds for job in jobs.values()) + turn_s
    seconds = f"{(turns - 0.5) * once_s:g}"  # by its clock, which goes on while it is stopped
    command = [sys.executable, "-c", _MAIN, "train", "profile", str(file), "--seconds", seconds]
    profile = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return _take_turns(jobs, profile, turns, turn_s)
    finally:
        _end(profile)


def _take_turns(
    jobs: dict[str, PausedJob], profile: subprocess.Popen[str], turns: int, turn_s: float
) -> dict[str, list[float]]:
    time.sleep(IMPORTS_S)
    signal_tree(profile.pid, signal.SIGSTOP)
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(turns):
        for name, job in jobs.items():
            found[name].append(job.window(turn_s, 1).step_s)
        signal_tree(profile.pid, signal.SIGCONT)
        time.sleep(turn_s)
        if profile.poll() is not None:
            break
        signal_tree(profile.pid, signal.SIGSTOP)
    if profile.poll() is None:
        signal_tree(profile.pid, signal.SIGCONT)
    told, _ = profile.communicate()
    if profile.returncode:
        raise SystemExit(f"mxn train profile ended with {profile.returncode}:\n{told[-2000:]}")
    return found


def _end(profile: subprocess.Popen[str]) -> None:
    """End a measurement that is not done as ctrl-c does, so that it leaves nothing behind."""
    if profile.poll() is not None:
        return
    processes = tree_of(profile.pid)
    signal_tree(profile.pid, signal.SIGCONT)
    profile.send_signal(signal.SIGINT)
    try:
        profile.wait(_END_S)
    except subprocess.TimeoutExpired:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
