"""`launch.start_process`, but the process is forked from one that has loaded torch already.

It runs the same module under the same name, in a session of its own, with its output in the same
file; only the seconds of imports are saved. Tests of what launcher and ranks do use it (`quickly`);
that the command line works is shown by those that do not.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mxn.train.run import launch, measure_start
from mxn.train.run.job import DeviceSettings
from support.forks import ForkedProcess, forkserver


def start_process(
    command: list[str], log_file: Path, group: DeviceSettings, more: Mapping[str, str] | None = None
) -> ForkedProcess:
    assert command[:2] == [sys.executable, "-m"]
    threads = str(group.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **(more or {})}
    process = forkserver().Process(target=_main, args=(command[2:], str(log_file), env))
    process.start()
    return ForkedProcess(process)


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Let jobs and measurements start their processes with `start_process` of this file."""
    patch.setattr(launch, "start_process", start_process)
    patch.setattr(measure_start, "start_process", start_process)


def _main(words: list[str], log: str, env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
