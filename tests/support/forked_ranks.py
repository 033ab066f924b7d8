"""Real ranks of a job, forked from a process that has loaded torch: seconds less for each launch.

`launch` takes the place of `mxn.train.run.launch.launch`; what a rank does is the same code.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401 (a fork need not load it)

from mxn.train.run import trainer  # noqa: F401 (as above)
from mxn.train.run.bridge import serve_store
from mxn.train.run.launch import RankSpec, rank_specs
from mxn.train.run.supervise.ranks import Death, Launching
from support.forks import forkserver


class ForkedRanks:
    """The processes of one launch. `pids` is by rank."""

    def __init__(self, launching: Launching, env: dict[str, str]) -> None:
        self.launching = launching
        self._store, address = serve_store()
        self._folder = tempfile.TemporaryDirectory()
        self._specs = rank_specs(launching, address)
        self._processes = [self._start(spec, env) for spec in self._specs]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def groups(self) -> list[str]:
        return [spec.group for spec in self._specs]

    def deaths(self) -> list[Death]:
        return [
            Death(rank=spec.rank, group=spec.group, code=process.exitcode)
            for spec, process in zip(self._specs, self._processes, strict=True)
            if process.exitcode
        ]

    def have_ended(self) -> bool:
        return all(process.exitcode is not None for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _start(self, spec: RankSpec, env: dict[str, str]) -> multiprocessing.Process:
        path = Path(self._folder.name) / f"{spec.rank}.json"
        path.write_text(spec.to_json())
        log = self.launching.log_folder / f"rank-{spec.rank}.log"
        process = forkserver().Process(target=_main, args=(str(path), str(log), env), daemon=True)
        process.start()
        return process


def _main(path: str, log: str, env: dict[str, str]) -> None:
    from mxn.train.run.rank import main

    os.setsid()  # ctrl-c of a terminal is the supervisor's business
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(main(path))
