"""Is a step of mixed ranks predicted right? Profile and job take turns of some seconds.

    python bench/train/predicted.py [--mix 1:0.5] [--turns 15]

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
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixed_jobs import Mix, brief, plan_of
from paused import PausedJob, signal_tree

from mxn.train.run.job_file import read_job
from mxn.train.run.prepare import task_of_job

IMPORTS_S = 16.0  # until the ranks of a measurement have begun
_MAIN = "from mxn.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mix", default="1:0.5")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn", type=float, default=6.0, help="seconds of each, at least")
    parser.add_argument("--rows", type=int, default=144, help="of a step; a micro-batch is one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MXN_HOME"] = f"{scratch}/home"
        shares = tuple(float(share) for share in options.mix.split(":"))
        mix = Mix(
            shares=shares, folder=Path(scratch), rows=options.rows, solo_rows=options.rows,
            seq_tokens=128,
        )  # fmt: skip
        file = mix.job("planned")
        job = PausedJob(file, mix.out("planned"))
        try:
            job.wait_for(4)  # steps: memory is taken, caches fill
            job.pause()
            step_s = in_turns(job, file, options.turns, options.turn)
            plan = plan_of(job.out)
        finally:
            job.end()
        told_s = task_of_job(read_job(file)).predict(plan).iteration_s
    print(
        json.dumps(
            {
                "schema": 1, "case": "train_predicted", "basis": "simulated", "mix": options.mix,
                "turns": options.turns, "turn_s": options.turn, "plan": brief(plan),
                "step_s": round(step_s, 4), "predicted_s": round(told_s, 4),
                "error": round(told_s / step_s - 1, 4),
            }
        )
    )  # fmt: skip


def in_turns(job: PausedJob, file: Path, turns: int, turn_s: float) -> float:
    """Measure the job's ranks anew between its steps; return the mean seconds of a step."""
    seconds = f"{2.2 * turns * turn_s:g}"  # by its clock, which goes on while it is stopped
    command = [sys.executable, "-c", _MAIN, "train", "profile", str(file), "--seconds", seconds]
    profile = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return _take_turns(job, profile, turns, turn_s)
    finally:
        signal_tree(profile.pid, signal.SIGKILL)  # where it was not done


def _take_turns(job: PausedJob, profile: subprocess.Popen[str], turns: int, turn_s: float) -> float:
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
    return spent_s / steps


if __name__ == "__main__":
    main()
