"""Run a function in one process per rank, each joined to the others by a real bridge.

    results = run_ranks("support.bridge_cases:exchange", ["cpu", "sim:0"], {"size": 3})

The function gets the bridge and the arguments and returns something JSON can hold.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 120


def run_ranks(
    function: str,
    devices: Sequence[str],
    arguments: dict[str, Any] | None = None,
    *,
    islands: Sequence[str | None] | None = None,
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Return what each rank returned. Raises: AssertionError with the output of one that failed."""
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    outputs = []
    processes = []
    for rank, device in enumerate(devices):
        task = {
            "function": function,
            "arguments": arguments or {},
            "address": address,
            "rank": rank,
            "size": len(devices),
            "device": device,
            "island": islands[rank] if islands else None,
            "options": options or {},
        }
        processes.append(start_rank(task))
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, f"rank {rank} failed:\n{err[-3000:]}"
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
        del store
    return outputs


def start_rank(task: dict[str, Any]) -> subprocess.Popen[str]:
    """Start one rank; its last line of stdout will be the result."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    return subprocess.Popen(
        [sys.executable, "-m", "support.ranks", json.dumps(task)],
        env=variables | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _main(task: dict[str, Any]) -> None:
    from mxn.chips import find_device
    from mxn.train.run.bridge import Bridge, BridgeOptions, LinkLimit

    options = task["options"]
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
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
