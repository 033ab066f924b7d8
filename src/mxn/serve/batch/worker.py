"""Works through batches: claims one, checks its file, runs its lines, writes its results.

Every line is a request to this server's own application, with low priority and the principal of
who made the batch. A line's attempt is noted before it begins and its result as soon as it is
there, so a gateway that dies costs at most the lines under way, and each line is billed once: an
attempt that had been settled is run again without being billed again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec

from mxn.serve.batch.files import FileStore
from mxn.serve.batch.store import BatchStore, Held, Line, now_us
from mxn.serve.batch.types import LineError, LineResponse, ResultLine
from mxn.serve.batch.validate import MAX_LINE_BYTES, check_lines
from mxn.serve.context import RequestContext

log = logging.getLogger("mxn.serve.batch")

LEASE_S = 30.0
_POLL_S = 2.0
_PAGE = 256
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

Answer = tuple[int, dict[str, str], bytes]
Call = Callable[[str, bytes, RequestContext], Awaitable[Answer]]
"""Runs one request in this process: (path, body, context) → (status, headers, body)."""


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
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._working: dict[asyncio.Task[None], str] = {}  # batches under way and their projects

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="mxn-batches")

    def wake(self) -> None:
        """Look for work now: a batch was made."""
        self._wake.set()

    async def stop(self) -> None:
        """Stop after cancelling the lines under way; another gateway or the next start goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(set(self._working))

    async def _run(self) -> None:
        while True:
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
            status = await asyncio.to_thread(self._batches.renew, held, self._lease_s)
            async with self._keeping(held) as lease:
                lease.is_cancelling = status == "cancelling"
                lease.is_lost = status is None
                await self._advance(held, lease)
        except asyncio.CancelledError:
            self._batches.release(held)
            raise
        except Exception:  # such as a database that is away: the lease ends, and it is tried again
            log.exception("working on batch %s failed; trying again", held.id)

    async def _advance(self, held: Held, lease: _Lease) -> None:
        if held.status == "validating" and not await self._validate(held):
            return
        if not lease.is_cancelling:
            await self._run_lines(held, lease)
        if lease.is_lost:
            return
        status = await asyncio.to_thread(self._batches.renew, held, self._lease_s)
        if status is None:
            return
        await self._finish(held, is_cancelled=status == "cancelling")

    async def _validate(self, held: Held) -> bool:
        """Check the file; return whether there is something to run or to finish."""
        lines = self._files.lines(held.input_file_id, self.max_line_bytes)
        checked = await asyncio.to_thread(
            check_lines, lines, held.endpoint, max_line_bytes=self.max_line_bytes
        )
        if checked.errors:
            await asyncio.to_thread(self._batches.fail, held, checked.errors)
            return False
        await asyncio.to_thread(self._batches.begin, held, checked.model, checked.lines)
        return True

    async def _run_lines(self, held: Held, lease: _Lease) -> None:
        """Run what is not done, `concurrency` lines at a time, until cancelled, expired or lost."""
        room = asyncio.Semaphore(self._concurrency)
        tasks: set[asyncio.Task[None]] = set()

        async def run(line: Line) -> None:
            try:
                await self._run_line(held, line, lease)
            finally:
                room.release()

        after = 0
        try:
            while not lease.must_stop:
                lines = await asyncio.to_thread(self._batches.next_lines, held, after, _PAGE)
                if not lines:
                    break
                for line in lines:
                    await room.acquire()
                    if lease.must_stop:
                        room.release()
                        break
                    task = asyncio.create_task(run(line))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    after = line.line
            if lease.is_lost:
                for task in tasks:
                    task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            for result in done:
                if isinstance(result, Exception):
                    raise result
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_line(self, held: Held, line: Line, lease: _Lease) -> None:
        billed_id = None
        if line.usage_id is not None and await asyncio.to_thread(
            self._batches.was_billed, line.usage_id
        ):
            billed_id = line.usage_id
        ended = await self._answer(held, line, billed_id, lease)
        if ended is None:
            return
        usage_id, (status, headers, body) = ended
        result = ResultLine(
            id=usage_id,
            custom_id=line.custom_id,
            response=LineResponse(
                status_code=status,
                request_id=headers.get("x-request-id", usage_id),
                body=msgspec.Raw(body),
            ),
            error=None,
        )
        text = msgspec.json.encode(result).decode()
        state = "completed" if status == 200 else "failed"
        await asyncio.to_thread(self._batches.end_line, held, line.line, state, text)

    async def _answer(
        self, held: Held, line: Line, billed_id: str | None, lease: _Lease
    ) -> tuple[str, Answer] | None:
        """Run a line until it has a final answer; what passes by itself is waited for.

        Each attempt has a row of its own in the ledger and is noted before it begins. Returns None
        when the batch is another gateway's meanwhile, or ends while the line waits for its turn.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            usage_id = billed_id or f"batch_req_{uuid.uuid4().hex}"
            if not await asyncio.to_thread(self._batches.start_line, held, line.line, usage_id):
                return None
            context = RequestContext(
                request_id=usage_id,
                principal=held.principal,
                endpoint=held.endpoint,
                is_batch=True,
                batch_id=held.id,
                usage_id=usage_id,
                is_billed=billed_id is None,
            )
            answer = await self._call(held.endpoint, line.body.encode(), context)
            if not _passes_by_itself(answer):
                return usage_id, answer
            with suppress(TimeoutError):
                await asyncio.wait_for(lease.stopping.wait(), _pause(answer, pause_s))
            if lease.must_stop:
                return None
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _finish(self, held: Held, *, is_cancelled: bool) -> None:
        await asyncio.to_thread(self._batches.to_finalizing, held)
        is_expired = now_us() > held.expires_us
        if is_cancelled or is_expired:
            await asyncio.to_thread(self._fail_rest, held, is_expired=is_expired)
        output = await asyncio.to_thread(self._write, held, "completed")
        errors = await asyncio.to_thread(self._write, held, "failed")
        status = "cancelled" if is_cancelled else "expired" if is_expired else "completed"
        await asyncio.to_thread(self._batches.finish, held, status, output, errors)

    def _fail_rest(self, held: Held, *, is_expired: bool) -> None:
        """Give every line that was not run its place in the error file."""
        code = "batch_expired" if is_expired else "batch_cancelled"
        message = f"This request was not run: the batch was {code.removeprefix('batch_')}."
        while lines := self._batches.next_lines(held, 0, _PAGE):
            results = [
                (
                    line.line,
                    msgspec.json.encode(
                        ResultLine(
                            id=f"batch_req_{uuid.uuid4().hex}",
                            custom_id=line.custom_id,
                            response=None,
                            error=LineError(code=code, message=message),
                        )
                    ).decode(),
                )
                for line in lines
            ]
            self._batches.fail_rest(held, results)

    def _write(self, held: Held, state: str) -> str | None:
        """Write the output or error file; None when it would be empty."""
        first = self._batches.results(held, state, 0, 1)
        if not first:
            return None
        kind = "output" if state == "completed" else "error"
        file = self._files.write(
            self._result_parts(held, state),
            owner=held.principal,
            filename=f"{held.id}_{kind}.jsonl",
            purpose="batch_output",
            expires_after_s=held.output_expires_s,
            has_quota=False,
        )
        return file.id

    def _result_parts(self, held: Held, state: str) -> Iterator[bytes]:
        after = 0
        while page := self._batches.results(held, state, after, _PAGE):
            yield b"".join(result.encode() + b"\n" for _, result in page)
            after = page[-1][0]

    @asynccontextmanager
    async def _keeping(self, held: Held) -> AsyncIterator[_Lease]:
        """Renew the lease in the background and note what others did to the batch."""
        lease = _Lease(is_cancelling=held.status == "cancelling", expires_us=held.expires_us)

        async def renew() -> None:
            valid_until_s = time.monotonic() + self._lease_s
            while not lease.is_lost:
                await asyncio.sleep(min(1.0, self._lease_s / 3))
                try:
                    status = await asyncio.to_thread(self._batches.renew, held, self._lease_s)
                except Exception:  # the database is away; the lease may end before it is back
                    log.warning("cannot renew the lease of batch %s", held.id, exc_info=True)
                    lease.is_lost = time.monotonic() > valid_until_s
                    lease.note()
                    continue
                valid_until_s = time.monotonic() + self._lease_s
                lease.is_lost = status is None
                lease.is_cancelling = status == "cancelling"
                lease.note()

        task = asyncio.create_task(renew())
        try:
            yield lease
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@dataclass(slots=True)
class _Lease:
    is_cancelling: bool
    expires_us: int
    is_lost: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # wakes lines that wait

    def note(self) -> None:
        """Wake the lines that wait when the batch must stop."""
        if self.must_stop:
            self.stopping.set()

    @property
    def must_stop(self) -> bool:
        return self.is_cancelling or self.is_lost or now_us() > self.expires_us


def _passes_by_itself(answer: Answer) -> bool:
    """Limits, overload and a replica that is away pass; a spent budget does not."""
    status, headers, _ = answer
    return status in (408, 429, 503) and headers.get("x-should-retry") != "false"


def _pause(answer: Answer, pause_s: float) -> float:
    """Wait as long as the server asks, else a growing time; with jitter, so lines spread out."""
    try:
        asked_s = float(answer[1].get("retry-after", ""))
    except ValueError:
        asked_s = 0.0
    return max(pause_s, min(asked_s, _LONGEST_PAUSE_S)) * random.uniform(0.8, 1.2)
