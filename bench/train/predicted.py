"""Is a step of mixed ranks predicted right? Profile and job take turns of some seconds.

    python bench/train/predicted.py [--mixes 1:0.5,1:0.25] [--turns 15] [--out FILE]

`mixed.py` profiles between its cycles, and on a machine whose speed changes by the second a profile
and a step that lie a minute apart differ by more than what is asked of a prediction. Here both are
let run in turns, so that they meet the same machine: a job by whole steps, and a measurement of the
same ranks (`mxn train profile`), stopped in between; it leaves out blocks with a stop in them. A
job would learn from steps with a stop in them, so this one keeps the counts of its plan. Ranks are
limited by cgroup quota, so `simulated`. Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixed_jobs import MODEL, Mix, brief, plan_of
from paused import PausedJob, signal_tree

from mxn.train.run.job_file import read_job
from mxn.train.run.prepare import task_of_job

IMPORTS_S = 16.0  # until the ranks of a measurement have begun
_MAIN = "from mxn.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixes", default="1:0.5,1:0.25,0.6:0.3:0.3:0.15")
    parser.add_argument("--turns", type=int, default=15)
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
    """Let a job of a mix and a measurement of its ranks take turns; return what is compared."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MXN_HOME"] = f"{scratch}/home"
        shares = tuple(float(share) for share in text.split(":"))
        mix = Mix(
            shares=shares, folder=Path(scratch), rows=rows, solo_rows=rows, seq_tokens=128
        )  # fmt: skip
        file = mix.job("planned")
        job = PausedJob(file, mix.out("planned"))
        try:
            job.wait_for(4)  # steps: memory is taken, caches fill
            job.pause()
            steps, step_s = in_turns(job, file, turns, turn_s)
            plan = plan_of(job.out)
        finally:
            job.end()
        told_s = task_of_job(read_job(file)).predict(plan).iteration_s
    return {
        "mix": text, "plan": brief(plan), "steps": steps, "step_s": round(step_s, 4),
        "predicted_s": round(told_s, 4), "error": round(told_s / step_s - 1, 4),
    }  # fmt: skip


def in_turns(job: PausedJob, file: Path, turns: int, turn_s: float) -> tuple[int, float]:
    """Measure the job's ranks anew between its steps; return how many, and their mean seconds."""
    seconds = f"{2.2 * turns * turn_s:g}"  # by its clock, which goes on while it is stopped
    command = [sys.executable, "-c", _MAIN, "train", "profile", str(file), "--seconds", seconds]
    profile = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return _take_turns(job, profile, turns, turn_s)
    finally:
        signal_tree(profile.pid, signal.SIGKILL)  # where it was not done


def _take_turns(
    job: PausedJob, profile: subprocess.Popen[str], turns: int, turn_s: float
) -> tuple[int, float]:
    time.sleep(IMPORTS_S)
    signal_tree(profile.pid, signal.SIGSTOP)
    steps, spent_s = 0, 0.0
    for _ in range(turns):
        window = job.window(turn_s, 2)
        steps, spent_s = steps + window.steps, spent_s + window.seconds
        if profile.poll() is not None:
            break
        signal_tree(profile.pid, signal.SIGCONT)
        time.sleep(turn_s)
        signal_tree(profile.pid, signal.SIGSTOP)
    signal_tree(profile.pid, signal.SIGCONT)
    told, _ = profile.communicate()
    if profile.returncode:
        raise SystemExit(f"mxn train profile ended with {profile.returncode}:\n{told[-2000:]}")
    return steps, spent_s / steps


if __name__ == "__main__":
    main()
