"""Run a function in one process per rank, each joined to the others by a real bridge.

    results = run_ranks("support.bridge_cases:exchange", ["cpu", "sim:0"], {"size": 3})

The function gets the bridge and the arguments and returns something JSON can hold. Ranks are forked
from one process that has torch imported and nothing else, which saves seconds for each of them.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 120

_forker: subprocess.Popen[str] | None = None


def run_ranks(
    function: str,
    devices: Sequence[str],
    arguments: dict[str, Any] | None = None,
    *,
    islands: Sequence[str | None] | None = None,
    options: dict[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Return what each rank returned. Raises: AssertionError with the output of one that failed."""
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            {
                "function": function,
                "arguments": arguments or {},
                "address": address,
                "rank": rank,
                "size": len(devices),
                "device": device,
                "island": islands[rank] if islands else None,
                "options": options or {},
                "out": f"{folder}/{rank}",
            }
            for rank, device in enumerate(devices)
        ]
        statuses = _ask(tasks, timeout_s)
        for rank, status in enumerate(statuses):
            said = Path(f"{folder}/{rank}.log").read_text()
            assert status == 0, f"rank {rank} ended with {status}:\n{said[-3000:]}"
        results = [
            json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(len(tasks))
        ]
    del store
    return results


def _ask(tasks: list[dict[str, Any]], timeout_s: float) -> list[int]:
    """Have the tasks done by forked processes; return their exit statuses."""
    global _forker
    if _forker is None or _forker.poll() is not None:
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        _forker = subprocess.Popen(
            [sys.executable, "-m", "support.ranks"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    assert _forker.stdin is not None
    assert _forker.stdout is not None
    _forker.stdin.write(json.dumps(tasks) + "\n")
    _forker.stdin.flush()
    if not select.select([_forker.stdout], [], [], timeout_s)[0]:
        os.killpg(_forker.pid, 9)
        _forker.wait()
        files = [Path(f"{task['out']}.log") for task in tasks]
        logs = [file.read_text()[-1500:] if file.is_file() else "not started" for file in files]
        raise AssertionError(f"no end in {timeout_s} s:\n" + "\n---\n".join(logs))
    return json.loads(_forker.stdout.readline())


def _serve() -> None:
    """Fork a process for each task of a line of stdin; answer with their exit statuses."""
    for name in ("mxn.train.run.trainer", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)  # seconds, which no rank has to spend again
    for line in sys.stdin:
        pids = [_fork(task) for task in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


def _fork(task: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{task['out']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        _run(task)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(task: dict[str, Any]) -> None:
    from mxn.chips import find_device
    from mxn.train.run import islands
    from mxn.train.run.bridge import Bridge, BridgeOptions, LinkLimit

    options = dict(task["options"])
    if options.pop("is_untagged", False):  # as if all backends were like nccl
        islands.TAGGED = frozenset()
    if "limit" in options:
        options["limit"] = LinkLimit(**options["limit"])
    bridge = Bridge.connect(
        task["address"],
        task["rank"],
        task["size"],
        find_device(task["device"]),
        island=task["island"],
        options=BridgeOptions(**options),
    )
    module, _, name = task["function"].partition(":")
    result = getattr(importlib.import_module(module), name)(bridge, **task["arguments"])
    bridge.close()
    Path(f"{task['out']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _serve()
