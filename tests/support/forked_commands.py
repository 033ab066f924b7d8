"""`mxn …` as a process of its own, forked from one that has the imports behind it.

Arguments, environment, standard streams and exit status are those of a command in a shell. Only
the second of imports is saved, which is most of what a short command takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mxn.ledger.migrations.upgrade
import mxn.ledger.rollup  # noqa: F401 (a fork need not load it, nor the one above)
from mxn.cli.main import main
from support.forks import ForkedProcess, forkserver


def run_mxn(
    words: Sequence[str], env: Mapping[str, str], *, input: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Raises: TimeoutExpired for a command that does not end; it is killed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streams = [f"{folder}/{number}" for number in range(3)]
        (folder / "0").write_text(input)
        process = forkserver().Process(target=_main, args=(list(words), dict(env), streams))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["mxn", *words], timeout_s)
        out, err = ((folder / stream).read_text() for stream in ("1", "2"))
        return subprocess.CompletedProcess(["mxn", *words], process.exitcode, out, err)


def start_mxn(words: Sequence[str], env: Mapping[str, str], log: Path) -> ForkedProcess:
    """Start a command that does not end by itself; what it says is in `log`."""
    log.write_text("")
    streams = [os.devnull, str(log), str(log)]
    process = forkserver().Process(target=_main, args=(list(words), dict(env), streams))
    process.daemon = True  # one that a failed test leaves ends with the tests
    process.start()
    return ForkedProcess(process)


def _main(words: list[str], env: dict[str, str], streams: list[str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, mode in enumerate("raa"):
        with open(streams[number], mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["mxn", *words]
    main()
