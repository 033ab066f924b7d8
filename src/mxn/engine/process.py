"""The engine process: loads a replica, then runs its loop between an inbox and an outbox.

Started by `supervisor.py` as ``python -m mxn.engine.process ENDPOINT CONFIG_JSON``. Messages are
MessagePack lists of `protocol` structs over one ZeroMQ pair socket on an ``ipc://`` address. Knows
no scheduling and no tensors. Start at `engine_main`.

Ends by itself on `Shutdown`, on SIGTERM, and when its parent is gone (end of file on stdin).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from mxn import env
from mxn.engine.config import EngineConfig
from mxn.engine.protocol import Failed, FromEngine, Loading, ModelInfo, Shutdown, ToEngine
from mxn.errors import MxnError, UserError

log = logging.getLogger("mxn.engine")

EXIT_LOAD_FAILED = 64  # the reason went to the client as a `Failed` without a request id
EXIT_CRASHED = 70


class Engine(Protocol):
    """What the loop drives: `EngineCore` for decoders, `EncoderCore` for encoders."""

    info: ModelInfo

    @property
    def has_work(self) -> bool: ...

    def handle(self, message: ToEngine) -> list[FromEngine]: ...

    def step(self) -> list[FromEngine]: ...

    def abort_all(self, reason: str) -> list[FromEngine]: ...


class Link:
    """The engine's end of the pair socket, with a way to be woken by a signal."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        # No high-water mark: a slow reader must never block the step of everyone else.
        self._socket.set_hwm(0)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[ToEngine])
        self._waker, self._wakeup = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeup.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd`: a byte written here ends `wait`."""
        return self._waker.fileno()

    def wait(self) -> None:
        """Sleep until a message or a signal is there."""
        self._poller.poll()
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def receive(self) -> list[ToEngine]:
        """Return all messages that have arrived; never waits."""
        messages: list[ToEngine] = []
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages += self._decode(frame)

    def _decode(self, frame: bytes) -> list[ToEngine]:
        """Return the messages of a frame; a malformed one is answered and disturbs nothing else."""
        try:
            return self._decoder.decode(frame)
        except msgspec.ValidationError:
            pass  # one of them is malformed: look at each alone, to name it
        good: list[ToEngine] = []
        for raw in msgspec.msgpack.decode(frame):
            try:
                good.append(msgspec.convert(raw, ToEngine))
            except msgspec.ValidationError as error:
                request_id = raw.get("request_id", "") if isinstance(raw, dict) else ""
                reason = f"malformed request: {error}"
                self.send([Failed(request_id=str(request_id), message=reason, is_user_error=True)])
        return good

    def send(self, messages: list[FromEngine]) -> None:
        """Send the messages as one frame, so that the reader wakes once."""
        if messages:
            self._socket.send(self._encoder.encode(messages))

    def close(self) -> None:
        """Flush what was sent (at most 2 s) and close."""
        self._socket.close(linger=2000)
        self._context.term()
        self._waker.close()
        self._wakeup.close()


class StopFlag:
    """Set by SIGTERM or `Shutdown`; the loop looks at it once a step."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, *_: object) -> None:
        self.is_set = True


def serve(engine: Engine, link: Link, stop: StopFlag) -> None:
    """Run until told to stop; sleeps while there is nothing to do."""
    while not stop.is_set:
        if not engine.has_work:
            link.wait()
        out: list[FromEngine] = []
        for message in link.receive():
            if isinstance(message, Shutdown):
                stop.set()
            else:
                out += engine.handle(message)
        if engine.has_work:
            out += engine.step()
        link.send(out)
    link.send(engine.abort_all("the engine is shutting down"))


def engine_main(config: EngineConfig, endpoint: str) -> int:
    """Load the replica of `config` and serve it on `endpoint`. Returns the exit status."""
    link, stop = Link(endpoint), StopFlag()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # nobody waits for a half-loaded model
    # Ctrl-C reaches the whole process group; the parent decides what it means for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(link.wakeup_fd, warn_on_full_buffer=False)
    try:
        engine = _load(config, link)
        if engine is None:
            return EXIT_LOAD_FAILED
        signal.signal(signal.SIGTERM, stop.set)
        # What was loaded lives as long as the process: the collector need not walk through it.
        gc.collect()
        gc.freeze()
        link.send([engine.info])
        serve(engine, link, stop)
        return 0
    except Exception:
        log.exception("engine crashed")
        return EXIT_CRASHED
    finally:
        signal.set_wakeup_fd(-1)
        link.close()


def _load(config: EngineConfig, link: Link) -> Engine | None:
    """Return the engine, or None after its failure to load was sent to the client."""
    from mxn.engine.load import build_engine

    def report(stage: str, done: int, total: int) -> None:
        link.send([Loading(stage=stage, done=done, total=total)])

    try:
        return build_engine(config, report)
    except MxnError as error:
        code = type(error).__name__
        is_user_error = isinstance(error, UserError)
        message = str(error)
    except Exception as error:
        log.exception("loading %s failed", config.model)
        code, is_user_error = "InternalError", False
        message = f"loading {config.model!r} failed: {type(error).__name__}: {error}"
    link.send([Failed(request_id="", message=message, is_user_error=is_user_error, code=code)])
    return None


def find_loader(name: str) -> Callable[..., Any]:
    """Return the function that ``"module:function"`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _exit_with_parent(endpoint: str) -> None:
    """End this process when stdin, which only the parent holds open, is at its end.

    A parent that was killed could not remove the socket and its folder, so this is done here.
    """
    path = Path(endpoint.removeprefix("ipc://"))

    def watch() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(OSError):  # the parent has removed them
            path.unlink()
            path.parent.rmdir()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _set_threads(num_threads: int) -> None:
    """Limit the compute threads; the variables must be set before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    # A thread that spins at a barrier takes the core from the one it waits for, once the machine
    # has other work; one that sleeps at once wakes late when it has none. A short spin loses
    # little either way (docs/log.md has the figures). Read by libgomp, torch's runtime on Linux.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    import torch

    torch.set_num_threads(num_threads)


def main(argv: list[str]) -> int:
    """Entry point of the process: ENDPOINT CONFIG_JSON."""
    endpoint, config_json = argv
    faulthandler.enable()  # a segmentation fault leaves a Python traceback in the log
    logging.basicConfig(
        level=env.get("MXN_LOG").upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    _exit_with_parent(endpoint)
    config = EngineConfig.from_json(config_json)
    _set_threads(config.num_threads)
    return engine_main(config, endpoint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
