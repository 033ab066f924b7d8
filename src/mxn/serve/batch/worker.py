"""Works through batches: claims one, checks its file, runs its lines, writes its results.

Every line is a request to this server's own application, with low priority and the principal of
who made the batch. A gateway that dies costs at most the lines under way, each line is billed once,
and a batch ends only when every line has its result.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import msgspec

from mxn.serve.batch.files import FileStore
from mxn.serve.batch.lease import Lease, LeaseLostError, keeping
from mxn.serve.batch.line_store import Held
from mxn.serve.batch.lines import PAGE, Answer, Call, LineRunner
from mxn.serve.batch.store import BatchStore, now_us
from mxn.serve.batch.types import LineError, ResultLine
from mxn.serve.batch.validate import MAX_LINE_BYTES, check_lines

__all__ = ["Answer", "BatchWorker", "Call"]

log = logging.getLogger("mxn.serve.batch")

LEASE_S = 30.0
_POLL_S = 2.0
_RESULTS = 32  # read at once; one of embeddings may have megabytes


class BatchWorker:
    """Runs beside the server from `start` to `stop`."""

    def __init__(
        self,
        files: FileStore,
        batches: BatchStore,
        call: Call,
        *,
        gateway_id: str,
        concurrency: int = 16,
        lease_s: float = LEASE_S,
        max_batches: int = 16,
    ) -> None:
        self._files = files
        self._batches = batches
        self._call = call
        self._gateway_id = gateway_id
        self._concurrency = concurrency
        self._lease_s = lease_s
        self._max_batches = max_batches
        self.max_line_bytes = MAX_LINE_BYTES
        self._checking = asyncio.Lock()
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._working: dict[asyncio.Task[None], str] = {}  # batches under way and their projects

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="mxn-batches")

    def wake(self) -> None:
        """Look for work now: a batch was made."""
        self._wake.set()

    async def stop(self) -> None:
        """Stop after cancelling the lines under way; another gateway or the next start goes on."""
        self._is_stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(set(self._working))

    async def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            try:
                await asyncio.to_thread(self._files.delete_expired)
                while await self._take_one():
                    pass
            except asyncio.CancelledError:
                raise
            except Exception:  # such as a database that is away: the lease ends, and we try again
                log.exception("working on batches failed; trying again")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_S)

    async def _take_one(self) -> bool:
        """Begin to work on one more batch; False when there is none or no room.

        The project with the fewest batches under way is first, and none has all the places.
        """
        if len(self._working) >= self._max_batches:
            return False
        counts = Counter(self._working.values())
        most = max(1, self._max_batches // 4)
        held = await asyncio.to_thread(
            self._batches.claim, self._gateway_id, self._lease_s, counts, most
        )
        if held is None:
            return False
        task = asyncio.create_task(self._work(held), name=f"mxn-batch-{held.id}")
        self._working[task] = held.principal.project_id
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._working[task]
        self._wake.set()

    async def _work(self, held: Held) -> None:
        try:
            async with keeping(self._batches, held, self._lease_s) as lease:
                await self._advance(held, lease)
        except asyncio.CancelledError:
            await self._release(held)
            raise
        except LeaseLostError:
            log.warning("batch %s was lost to another gateway, or may be", held.id)
        except Exception:  # such as a database that is away: the lease ends, and it is tried again
            log.exception("working on batch %s failed; trying again", held.id)

    async def _release(self, held: Held) -> None:
        """Give a batch back. If that fails its lease ends by itself; nothing else may fail here,
        for it would take the place of the cancellation."""
        try:
            await asyncio.to_thread(self._batches.release, held)
        except Exception:
            log.warning("batch %s could not be given back", held.id, exc_info=True)

    async def _advance(self, held: Held, lease: Lease) -> None:
        if not held.has_lines:
            if not await self._validate(held):
                return
            lease.note(await asyncio.to_thread(self._batches.renew, held, self._lease_s))
        lines = LineRunner(self._batches, self._call, held, lease, concurrency=self._concurrency)
        await lines.run()
        lease.note(await asyncio.to_thread(self._batches.renew, held, self._lease_s))
        lease.require()
        await self._finish(held, is_cancelled=lease.is_cancelling)

    async def _validate(self, held: Held) -> bool:
        """Check the file; return whether there is something to run or to finish.

        Raises: LeaseLostError.
        """
        async with self._checking:  # a file may have 200 MB, and all of it is held
            lines = self._files.lines(held.input_file_id, self.max_line_bytes)
            checked = await asyncio.to_thread(
                check_lines, lines, held.endpoint, max_line_bytes=self.max_line_bytes
            )
            if checked.errors:
                await asyncio.to_thread(self._batches.fail, held, checked.errors)
                return False
            begin = self._batches.begin
            if not await asyncio.to_thread(begin, held, checked.model, checked.lines):
                raise LeaseLostError
        return True

    async def _finish(self, held: Held, *, is_cancelled: bool) -> None:
        is_expired = held.is_expired
        if is_cancelled or now_us() > held.expires_us:
            num_left = await asyncio.to_thread(self._fail_rest, held, is_expired=not is_cancelled)
            is_expired = is_expired or (num_left > 0 and not is_cancelled)
        if not await asyncio.to_thread(self._batches.to_finalizing, held):
            raise LeaseLostError  # or a line has no result, which the next attempt gives it
        output = await asyncio.to_thread(self._write, held, "completed")
        errors = await asyncio.to_thread(self._write, held, "failed")
        status = "cancelled" if is_cancelled else "expired" if is_expired else "completed"
        if not await asyncio.to_thread(self._batches.finish, held, status, output, errors):
            for file_id in filter(None, (output, errors)):  # nobody would find them
                await asyncio.to_thread(self._files.delete, file_id, held.principal.project_id)

    def _fail_rest(self, held: Held, *, is_expired: bool) -> int:
        """Give every line that was not run its place in the error file; return how many there
        were. Raises: LeaseLostError."""
        error = self._why(held, is_expired=is_expired)
        num = 0
        while lines := self._batches.next_lines(held, 0, PAGE):
            results = [(line.line, _not_run(line.custom_id, error)) for line in lines]
            if not self._batches.fail_rest(held, results, is_expired=is_expired):
                raise LeaseLostError
            num += len(lines)
        return num

    def _why(self, held: Held, *, is_expired: bool) -> LineError:
        code, why = "batch_cancelled", "the batch was cancelled"
        if is_expired:
            code, why = "batch_expired", "the batch has expired"
        elif (over := self._batches.why_over(held)) is not None:
            code, why = over.code, over.message
        return LineError(code=code, message=f"This request was not run: {why}.")

    def _write(self, held: Held, state: str) -> str | None:
        """Write the output or error file; None when it would be empty."""
        first = self._batches.results(held, state, 0, 1)
        if not first:
            return None
        name = f"{held.id}_{'output' if state == 'completed' else 'error'}.jsonl"
        # Of an attempt that wrote them and could not enter them: nobody would find them.
        project, may = held.principal.project_id, partial(self._batches.lock, held=held)
        if not self._files.delete_named(project, "batch_output", name, may):
            raise LeaseLostError
        file = self._files.write(
            self._result_parts(held, state),
            owner=held.principal,
            filename=name,
            purpose="batch_output",
            expires_after_s=held.output_expires_s,
            has_quota=False,
        )
        return file.id

    def _result_parts(self, held: Held, state: str) -> Iterator[bytes]:
        after = 0
        while page := self._batches.results(held, state, after, _RESULTS):
            for _, result in page:
                yield result.encode() + b"\n"
            after = page[-1][0]


def _not_run(custom_id: str, error: LineError) -> str:
    """Return the line of an error file for a request that was not run."""
    result = ResultLine(
        id=f"batch_req_{uuid.uuid4().hex}", custom_id=custom_id, response=None, error=error
    )
    return msgspec.json.encode(result).decode()
