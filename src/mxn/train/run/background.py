"""Work in the background of a rank: handles of what is under way, and threads that do it in order.

Knows tensors as results only. Start at `Worker`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Handle(Protocol):
    """Something under way. `wait` returns the tensor once it may be used on the current stream."""

    def wait(self) -> Tensor: ...

    def is_done(self) -> bool:
        """Whether `wait` would return at once; may say no of what is done and not waited for."""
        ...


@dataclass(slots=True)
class Done:
    """A handle of what is already there."""

    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor

    def is_done(self) -> bool:
        return True


@dataclass(slots=True)
class Job:
    """What a worker was given; done once `run` returned or raised."""

    run: Callable[[], Tensor | Job]  # a job: that one goes on with it
    done: threading.Event = field(default_factory=threading.Event)
    result: Tensor | Job | None = None
    error: BaseException | None = None


class Worker:
    """A thread that does jobs in order. What a job raises comes out of its handle."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], Tensor | Job]) -> Job:
        job = Job(run)
        self._jobs.put(job)
        return job

    def close(self, timeout_s: float) -> None:
        """Finish what was submitted; a thread that still waits for a peer is left behind."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.run()
            except BaseException as error:  # raised again where the handle is waited for
                job.error = error
            job.done.set()


@dataclass(slots=True)
class Background:
    """A job of a worker thread."""

    job: Job
    on_waited: Callable[[float], None] | None = None  # told how long `wait` stood still

    def wait(self) -> Tensor:
        begin_s = time.monotonic()
        result: Tensor | Job | None = self.job
        while isinstance(result, Job):
            result.done.wait()
            if result.error is not None:
                raise result.error
            result = result.result
        if self.on_waited is not None:
            self.on_waited(time.monotonic() - begin_s)
        assert result is not None
        return result

    def is_done(self) -> bool:
        job: Tensor | Job | None = self.job
        while isinstance(job, Job) and job.done.is_set() and job.error is None:
            job = job.result
        return not isinstance(job, Job)
