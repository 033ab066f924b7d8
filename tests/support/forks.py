"""The server that tests fork processes from: its imports, seconds of torch, are paid once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
from pathlib import Path

PRELOADED = ["support.one_rank", "support.forked_ranks", "support.forked_commands"]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return the context whose `Process` is forked; there is one server for each test process."""
    tests = str(Path(__file__).parents[1])
    if tests not in os.environ.get("PYTHONPATH", ""):  # the server sees no other path of ours
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
