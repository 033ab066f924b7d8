"""`EngineChild.spawn`, but the engine is forked from a process that has loaded torch already.

It runs the same `main` with the same arguments, environment and streams. Saved are the seconds of
imports; not as with users are what is read before or behind `main`, such as thread settings of
OpenMP. Tests of what an engine does use it (`quickly`); that the real start works is shown by those
that do not.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.process
import os
import sys
from multiprocessing.connection import Connection

import pytest

import mxn.engine.load
import mxn.models.native.decoder  # noqa: F401 (a fork need not load it, nor the one above)
from mxn.engine import process as engine_process
from mxn.engine.config import EngineConfig
from mxn.engine.supervisor import EngineChild
from support.forks import forkserver


class ForkedEngine:
    """What `EngineChild` uses of `asyncio.subprocess.Process`."""

    def __init__(
        self,
        process: multiprocessing.process.BaseProcess,
        stdin: Connection,
        stdout: asyncio.StreamReader,
    ) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid
        self._stdin, self.stdout = stdin, stdout  # its input ends with us
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        loop.add_reader(process.sentinel, self._note_end)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        assert self._process.exitcode is not None
        self._ended.set_result(self._process.exitcode)
        self._stdin.close()


async def spawn(config: EngineConfig, endpoint: str) -> EngineChild:
    """Start an engine as `EngineChild.spawn` does."""
    input_end, stdin = multiprocessing.Pipe(duplex=False)
    stdout, output_end = multiprocessing.Pipe(duplex=False)
    words = [endpoint, config.to_json()]
    process = forkserver().Process(
        target=_main, args=(words, dict(os.environ), input_end, output_end)
    )
    process.daemon = True  # one that a failed test leaves ends with the tests
    await asyncio.to_thread(process.start)  # the first one waits for imports
    input_end.close()
    output_end.close()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(stdout.fileno()), "rb", 0)
    )
    stdout.close()
    return EngineChild(ForkedEngine(process, stdin, reader))  # type: ignore[arg-type]


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Let engines be started with `spawn` of this file."""
    patch.setattr(EngineChild, "spawn", spawn)


def _main(
    words: list[str], env: dict[str, str], input_end: Connection, output_end: Connection
) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.dup2(input_end.fileno(), 0)
    os.dup2(output_end.fileno(), 1)
    os.dup2(output_end.fileno(), 2)
    input_end.close()
    output_end.close()
    sys.exit(engine_process.main(words))
