"""The server's side of an engine process: an `EngineClient` for asyncio.

One wake-up of the event loop serves all requests of a step: the engine sends a step's deltas as one
message, and the socket's file descriptor is watched by the loop directly. Knows no HTTP. Start at
`ProcessEngine.start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from mxn import errors
from mxn.engine.adapters import NOT_FOUND_CODE
from mxn.engine.config import EngineConfig
from mxn.engine.protocol import (
    ENDED_CODE,
    AdapterLoaded,
    Cancel,
    Delta,
    Encode,
    Encoded,
    EngineStats,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    LoadAdapter,
    Loading,
    ModelInfo,
    Shutdown,
    ToEngine,
    UnloadAdapter,
)
from mxn.engine.supervisor import CrashReport, EngineChild, RestartPolicy, State, Supervisor
from mxn.errors import (
    CapacityError,
    ConfigError,
    EngineDiedError,
    InternalError,
    MxnError,
    NotFoundError,
    UserError,
)

log = logging.getLogger("mxn.engine.client")

MAX_IPC_PATH = 100  # Unix socket paths end at 107 bytes

Progress = Callable[[Loading], None]
T = TypeVar("T")


def error_of(failed: Failed) -> MxnError:
    """Return the exception that a `Failed` stands for; its `code` goes along."""
    if failed.code in ("context_length_exceeded", "overloaded"):
        return CapacityError(failed.message, code=failed.code)
    if failed.code == ENDED_CODE:
        return EngineDiedError(failed.message, retry_after_s=1.0)
    if failed.code == NOT_FOUND_CODE:
        return NotFoundError(failed.message, code=failed.code)
    kind = UserError if failed.is_user_error else InternalError
    return kind(failed.message, code=failed.code)


def load_error_of(failed: Failed) -> MxnError:
    """Return the exception for a failed load, whose `code` names its class."""
    if failed.code == ENDED_CODE:
        return error_of(failed)
    message, _, hint = failed.message.partition("\nhint: ")
    kind = getattr(errors, failed.code or "", InternalError)
    try:
        return kind(message, hint=hint or None)
    except TypeError:  # a class that wants more, such as the device of a ChipError
        return InternalError(message, hint=hint or None)


class Link:
    """The client's end of the pair socket: sends requests, hands replies to who waits for them."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mxn-"))  # mode 0700: nobody else can connect
        path = str(self._folder / "engine")
        if len(path) > MAX_IPC_PATH:
            self._folder.rmdir()
            raise ConfigError(
                f"socket path {path!r} is longer than {MAX_IPC_PATH} bytes",
                hint="set TMPDIR to a shorter folder",
            )
        self.endpoint = f"ipc://{path}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(self.endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[FromEngine])
        self._waiting: dict[str, asyncio.Queue[FromEngine | MxnError]] = {}
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)
        self.on_progress: Progress | None = None
        self.ready: asyncio.Future[ModelInfo] = self._loop.create_future()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def open(
        self, request: Generate | Encode | GetStats | LoadAdapter | UnloadAdapter
    ) -> asyncio.Queue[FromEngine | MxnError]:
        """Send a request and return the queue of its replies; pair it with `forget`."""
        request_id = request.request_id
        if request_id in self._waiting:
            raise UserError(f"request id {request_id!r} is already in use")
        queue = self._waiting[request_id] = asyncio.Queue()
        self.send(request)
        return queue

    def forget(self, request_id: str) -> None:
        """Drop the queue of a request; replies that still come for it are ignored."""
        self._waiting.pop(request_id, None)

    def send(self, message: ToEngine) -> None:
        """Send without ever waiting; what is sent to a process that is gone gets lost.

        A pair socket blocks while it has no peer, and here that would stop the event loop for good:
        nobody would see any more that the process has ended, which fails the requests it had.
        """
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode([message]), zmq.NOBLOCK)
        # The descriptor signals edges: a send may swallow the one for a message that has come.
        self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Hand out everything that has arrived."""
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in self._decoder.decode(frame):
                self._dispatch(message)

    def _dispatch(self, message: FromEngine) -> None:
        if isinstance(message, Loading):
            if self.on_progress:
                self.on_progress(message)
        elif isinstance(message, ModelInfo):
            if not self.ready.done():
                self.ready.set_result(message)
        elif isinstance(message, Failed) and not message.request_id:
            if not self.ready.done():
                self.ready.set_exception(load_error_of(message))
        elif queue := self._waiting.get(message.request_id):
            queue.put_nowait(message)

    def close(self, error: MxnError) -> None:
        """Deliver what has arrived, fail everyone else with `error`, and release the socket."""
        if self._socket.closed:
            return
        self.drain()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
        for queue in self._waiting.values():
            queue.put_nowait(error)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen: nobody may be waiting for it any more


class _Running:
    """One incarnation for the supervisor: the process, the link to it, what it said it is."""

    def __init__(self, child: EngineChild, link: Link, info: ModelInfo) -> None:
        self.child, self.link, self.info = child, link, info

    def ended(self, error: EngineDiedError) -> None:
        self.link.close(error)


class ProcessEngine:
    """An `EngineClient` over an engine process that is restarted when it dies."""

    def __init__(self, config: EngineConfig, *, policy: RestartPolicy | None = None) -> None:
        self.config = config
        self._progress: Progress | None = None
        self._supervisor = Supervisor(self._launch, policy=policy)
        self._num_stats = 0
        self._info: ModelInfo | None = None
        self._adapters: dict[str, LoadAdapter] = {}  # what a new process has to load again

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Progress | None = None,
        policy: RestartPolicy | None = None,
    ) -> ProcessEngine:
        """Start the process and wait until the model is loaded.

        Raises: what loading raised (NotFoundError, CapacityError, UnsupportedError, …), or
        EngineDiedError with the end of the log.
        """
        engine = cls(config, policy=policy)
        engine._progress = on_progress
        await engine._supervisor.start()
        return engine

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "use ProcessEngine.start"
        return self._info

    @property
    def is_healthy(self) -> bool:
        return self._supervisor.state == "ready"

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def last_crash(self) -> CrashReport | None:
        """How the process last died, with the end of its log."""
        return self._supervisor.last_crash

    @property
    def num_restarts(self) -> int:
        return self._supervisor.num_restarts

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is none."""
        current = self._supervisor.current
        return current.child.pid if current else None

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`. Closing the generator early cancels."""
        link = self._link()
        queue = link.open(request)
        is_finished = False
        try:
            while not is_finished:
                delta = await _reply(queue, Delta)
                is_finished = delta.finish_reason is not None
                yield delta
        except MxnError:
            is_finished = True  # the engine has already let go of it
            raise
        finally:
            link.forget(request.request_id)
            if not is_finished:
                link.send(Cancel(request_id=request.request_id))

    async def encode(self, request: Encode) -> Encoded:
        """Return one row for each sequence, in the order given."""
        link = self._link()
        queue = link.open(request)
        try:
            return await _reply(queue, Encoded)
        except asyncio.CancelledError:
            link.send(Cancel(request_id=request.request_id))
            raise
        finally:
            link.forget(request.request_id)

    async def stats(self) -> EngineStats:
        """Return the engine's counters. Raises: EngineDiedError."""
        link = self._link()
        self._num_stats += 1
        request = GetStats(request_id=f"stats-{self._num_stats}")
        queue = link.open(request)
        try:
            return await _reply(queue, EngineStats)
        finally:
            link.forget(request.request_id)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    async def load_adapter(self, request: LoadAdapter) -> AdapterLoaded:
        """Load a LoRA adapter, in place of one that has its name; a restart loads it again.

        Raises: NotFoundError, UnsupportedError, CapacityError, with the reason; EngineDiedError.
        """
        loaded = await _change(self._link(), request)
        self._adapters[request.name] = request
        return loaded

    async def unload_adapter(self, request: UnloadAdapter) -> AdapterLoaded:
        """Forget an adapter; returns when the last request that uses it has ended.

        New requests for it are refused at once. A process that has died has unloaded it, and the
        next one does not load it. Raises: NotFoundError, EngineDiedError.
        """
        before = self._adapters.pop(request.name, None)
        try:
            return await _change(self._link(), request)
        except EngineDiedError:
            if before is None:
                raise
            return AdapterLoaded(request_id=request.request_id, adapters=self.adapters)

    async def close(self, *, grace_s: float = 5.0) -> None:
        """Stop the process: ask, wait, then SIGTERM, then SIGKILL. Running requests fail."""
        running = self._supervisor.current
        await self._supervisor.close()
        if not isinstance(running, _Running):
            return
        running.link.send(Shutdown())
        await running.child.stop(grace_s)
        running.link.close(EngineDiedError("the engine was closed"))

    def _link(self) -> Link:
        running = self._supervisor.current
        if not isinstance(running, _Running):
            raise self._supervisor.unavailable()
        return running.link

    async def _load_again(self, link: Link) -> None:
        """Give a new process the adapters that the one before had.

        One that cannot be loaded any more is dropped: the base model must not wait for it.
        """
        for name, request in list(self._adapters.items()):
            try:
                await _change(link, request)
                if name not in self._adapters:  # unloaded meanwhile
                    await _change(link, UnloadAdapter(request_id=request.request_id, name=name))
            except EngineDiedError:
                raise
            except MxnError as error:
                log.error("adapter %r is gone after a restart: %s", name, error)
                self._adapters.pop(name, None)

    async def _launch(self) -> _Running:
        link = Link()
        link.on_progress = self._progress
        try:
            child = await EngineChild.spawn(self.config, link.endpoint)
        except BaseException:
            link.close(EngineDiedError("the engine did not start"))
            raise
        died = asyncio.create_task(child.wait())
        try:
            await asyncio.wait((link.ready, died), return_when=asyncio.FIRST_COMPLETED)
            link.drain()
            if not link.ready.done():
                raise _died_while_loading(died.result())
            self._info = link.ready.result()
            await _unless_died(self._load_again(link), died)
            return _Running(child, link, self._info)
        except BaseException:
            await child.stop(grace_s=1.0)
            link.close(EngineDiedError("the engine did not start"))
            raise
        finally:
            died.cancel()


async def _unless_died(work: Coroutine[Any, Any, None], died: asyncio.Task[CrashReport]) -> None:
    """Wait for what a process that is not watched yet has to do. Raises: EngineDiedError."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, died), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _died_while_loading(died.result())
        task.result()
    finally:
        task.cancel()


async def _change(link: Link, request: LoadAdapter | UnloadAdapter) -> AdapterLoaded:
    queue = link.open(request)
    try:
        return await _reply(queue, AdapterLoaded, load_error_of)
    finally:
        link.forget(request.request_id)


async def _reply(
    queue: asyncio.Queue[FromEngine | MxnError],
    kind: type[T],
    error_of: Callable[[Failed], MxnError] = error_of,
) -> T:
    """Return the next reply, or raise the error that came instead."""
    message = await queue.get()
    if isinstance(message, Failed):
        raise error_of(message)
    if isinstance(message, MxnError):
        # Each waiter raises its own: a traceback grows on the exception it is raised with.
        raise _copy(message)
    if not isinstance(message, kind):
        raise InternalError(f"expected {kind.__name__} from the engine, got {message!r}")
    return message


def _copy(error: MxnError) -> MxnError:
    if isinstance(error, EngineDiedError):
        return EngineDiedError(error.message, hint=error.hint, retry_after_s=error.retry_after_s)
    return error


def _died_while_loading(report: CrashReport) -> EngineDiedError:
    tail = "\n".join(report.log_tail[-15:])
    return EngineDiedError(f"the engine died while loading: {report.reason}\n{tail}".rstrip())
