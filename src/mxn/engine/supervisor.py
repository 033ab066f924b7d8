"""Keeps one engine process alive: starts, watches and restarts it, later and later, or gives up.

Knows processes and time; what is said over the socket is the business of `client.py`.
`RestartPolicy` is pure. Start at `Supervisor.start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mxn.engine.config import EngineConfig
from mxn.errors import EngineDiedError
from mxn.units import format_seconds

log = logging.getLogger("mxn.engine.supervisor")
engine_log = logging.getLogger("mxn.engine.process")
_LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR")}

State = Literal["starting", "ready", "restarting", "failed", "closed"]


@dataclass(slots=True, kw_only=True)
class RestartPolicy:
    """When to try again: at once-ish, then later and later; not at all after too many crashes."""

    max_crashes: int = 5
    window_s: float = 600.0
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    crashes_s: deque[float] = field(default_factory=deque)

    def crashed(self, now_s: float) -> float | None:
        """Record a crash; return the seconds to wait before a restart, or None to give up."""
        self.crashes_s.append(now_s)
        while self.crashes_s[0] < now_s - self.window_s:
            self.crashes_s.popleft()
        if len(self.crashes_s) >= self.max_crashes:
            return None
        return min(self.max_delay_s, self.first_delay_s * 2 ** (len(self.crashes_s) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """How an engine process ended when nobody had asked it to."""

    exit_code: int  # negative: the signal
    log_tail: tuple[str, ...]
    uptime_s: float

    @property
    def reason(self) -> str:
        """One line: ``killed by SIGKILL after 12 s``."""
        after = f"after {format_seconds(self.uptime_s)}"
        if self.exit_code >= 0:
            return f"exit status {self.exit_code} {after}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-self.exit_code).name} {after}"
        return f"killed by signal {-self.exit_code} {after}"


class EngineChild:
    """One engine process and the last lines it logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._started_s = time.monotonic()
        self.log_tail: deque[str] = deque(maxlen=40)
        self._reader = asyncio.create_task(self._read_log())

    @classmethod
    async def spawn(cls, config: EngineConfig, endpoint: str) -> EngineChild:
        """Start `mxn.engine.process`. Its stdin stays open as long as we live: see `process.py`."""
        process = await asyncio.create_subprocess_exec(
            # -P: no file in the folder where mxn was started may shadow a module.
            sys.executable, "-P", "-m", "mxn.engine.process", endpoint, config.to_json(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> CrashReport:
        """Return how it ended, once it has."""
        exit_code = await self._process.wait()
        uptime_s = time.monotonic() - self._started_s
        await asyncio.shield(self._reader)
        return CrashReport(exit_code=exit_code, log_tail=tuple(self.log_tail), uptime_s=uptime_s)

    async def stop(self, grace_s: float) -> None:
        """Wait `grace_s` for an end that was asked for, then SIGTERM, then SIGKILL."""
        for send in (lambda: None, self._process.terminate, self._process.kill):
            with contextlib.suppress(ProcessLookupError):
                send()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
                await asyncio.shield(self._reader)
                return
        await self._process.wait()

    async def _read_log(self) -> None:
        stream, rest = self._process.stdout, b""
        assert stream is not None, "spawn asks for a pipe"
        while chunk := await stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._keep(line)
        if rest:
            self._keep(rest)

    def _keep(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.log_tail.append(text)
        # The engine's own level is the first word of its lines; a traceback has none.
        level, _, rest = text.partition(" ")
        if level in _LEVELS:
            engine_log.log(_LEVELS[level], "%s", rest)
        else:
            engine_log.info("%s", text)


class Incarnation(Protocol):
    """One run of the engine: a process and the channel to it."""

    child: EngineChild

    def ended(self, error: EngineDiedError) -> None:
        """The process is gone: deliver what it still said, then fail what was under way."""
        ...


class Supervisor:
    """Runs incarnations one after the other.

    `launch` starts a process and returns when it is ready to serve; it raises when it cannot be.
    """

    def __init__(
        self,
        launch: Callable[[], Awaitable[Incarnation]],
        *,
        policy: RestartPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launch = launch
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._retry_at_s = 0.0
        self.state: State = "starting"
        self.current: Incarnation | None = None
        self.last_crash: CrashReport | None = None
        self.last_reason = ""
        self.num_restarts = 0

    async def start(self) -> Incarnation:
        """Start the engine for the first time. A failure is raised and not retried."""
        self.current = await self._launch()
        self.state = "ready"
        self._task = asyncio.create_task(self._watch(), name="mxn-engine-supervisor")
        return self.current

    def unavailable(self) -> EngineDiedError:
        """Return the error for a request that comes while there is no engine.

        Requests fail at once instead of waiting: a client or router can go to another replica.
        """
        if self.state == "closed":
            return EngineDiedError("the engine is closed")
        if self.state == "failed":
            return EngineDiedError(
                f"the engine is down: {self.last_reason}; gave up after "
                f"{len(self._policy.crashes_s)} crashes",
                hint="read the engine's log, then restart the server",
            )
        retry_s = max(1.0, self._retry_at_s - self._clock())
        return EngineDiedError(
            f"the engine is restarting: {self.last_reason}",
            hint=f"retry in about {format_seconds(retry_s)}",
            retry_after_s=retry_s,
        )

    async def close(self) -> None:
        """Stop watching, so that the end of the process is no crash."""
        self.state = "closed"
        self.current = None
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while self.current is not None:
            report = await self.current.child.wait()
            died, self.current, self.last_crash = self.current, None, report
            died.ended(self._crashed(report.reason, report.log_tail))
            while self.state == "restarting" and self.current is None:
                await asyncio.sleep(max(0.0, self._retry_at_s - self._clock()))
                await self._relaunch()

    async def _relaunch(self) -> None:
        try:
            self.current = await self._launch()
        except Exception as error:
            # Whatever went wrong while loading: it is reported, and counts as a crash.
            self._crashed(f"restart failed: {error}", ())
            return
        self.num_restarts += 1
        self.state = "ready"
        log.warning("engine restarted, process %d", self.current.child.pid)

    def _crashed(self, reason: str, log_tail: tuple[str, ...]) -> EngineDiedError:
        """Report a crash, decide what comes next, return the error for those it hit."""
        now_s = self._clock()
        delay_s = self._policy.crashed(now_s)
        self.last_reason = reason
        self.state = "failed" if delay_s is None else "restarting"
        self._retry_at_s = now_s + (delay_s or 0.0)
        then = "giving up" if delay_s is None else f"restart in {format_seconds(delay_s)}"
        log.error("engine process died: %s; %s", reason, then)
        for line in log_tail[-15:]:
            log.error("engine log: %s", line)
        return EngineDiedError(
            f"the engine process died: {reason}",
            hint="the request was not finished; send it again" if delay_s is not None else None,
            retry_after_s=delay_s,
        )
