"""The loop of a replica that embeds or scores: sequences in, one row for each out.

Sequences of all waiting requests are sorted by length and cut into batches of about a token budget,
so that little is spent on padding; results leave in the order of the caller. Knows no processes.
Start at `EncoderCore.step`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mxn.engine.adapters import refusal
from mxn.engine.counters import Counters
from mxn.engine.protocol import (
    ENDED_CODE,
    Cancel,
    Encode,
    Encoded,
    EngineStats,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    LoadAdapter,
    ModelInfo,
    ToEngine,
    UnloadAdapter,
)

if TYPE_CHECKING:
    from mxn.models.base import TextEncoder

# Sorting by length reaches this many batches ahead: further would make early requests wait.
WINDOW_BATCHES = 8


@dataclass(slots=True)
class _Job:
    """A request under way: rows arrive in any order."""

    request: Encode
    rows: list[bytes]
    num_missing: int
    prompt_tokens: int
    device_s: float = 0.0


@dataclass(slots=True)
class _Piece:
    """One sequence of a request."""

    job: _Job
    index: int
    token_ids: list[int]
    token_types: list[int] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.token_ids)


def cut_batches(pieces: list[_Piece], max_tokens: int) -> list[list[_Piece]]:
    """Return batches of similar lengths, each at most `max_tokens` padded (or one sequence)."""
    batches: list[list[_Piece]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        last = batches[-1] if batches else None
        has_types = piece.token_types is not None
        if (
            last is None
            or len(last[0]) * (len(last) + 1) > max_tokens  # the first of a batch is its longest
            or (last[0].token_types is not None) != has_types
        ):
            batches.append([piece])
        else:
            last.append(piece)
    return batches


class EncoderCore:
    """Single-threaded: `handle` messages, `step` while there is work."""

    def __init__(self, model: TextEncoder, info: ModelInfo, *, max_batch_tokens: int) -> None:
        self.info = info
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._jobs: dict[str, _Job] = {}
        self._pieces: deque[_Piece] = deque()
        self._batches: deque[list[_Piece]] = deque()
        self._counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self._pieces or self._batches)

    def handle(self, message: ToEngine) -> list[FromEngine]:
        """Take a message; return what can be answered at once."""
        if isinstance(message, Encode):
            return self._add(message)
        if isinstance(message, Cancel):
            if self._jobs.pop(message.request_id, None):
                self._counters.requests_cancelled_total += 1
            return []
        if isinstance(message, GetStats):
            return [self.stats(message.request_id)]
        if isinstance(message, LoadAdapter | UnloadAdapter):
            return [refusal(message, f"a replica of kind {self.info.kind} takes no adapters")]
        if isinstance(message, Generate):
            reason = (
                f"this replica runs a {self.info.kind} ({self.info.family}); it cannot generate"
            )
            return [_refuse(message.request_id, reason, "model_not_supported")]
        return []

    def step(self) -> list[FromEngine]:
        """Encode one batch; return the requests that it completed."""
        if not self._batches:
            self._batches.extend(cut_batches(self._take_window(), self._max_batch_tokens))
        batch = [piece for piece in self._batches.popleft() if self._is_alive(piece)]
        if not batch:
            return []
        started_s = time.perf_counter()
        try:
            rows = self._encode(batch)
        except Exception as error:  # whatever a chip throws
            return self._retry(batch, error)
        self._counters.steps_total += 1
        took_s = time.perf_counter() - started_s
        self._counters.busy_s += took_s
        num_tokens = sum(map(len, batch))
        for piece in batch:
            piece.job.device_s += took_s * len(piece) / num_tokens
        return self._deliver(batch, rows)

    def stats(self, request_id: str = "") -> EngineStats:
        """Return the counters and what is waiting."""
        return self._counters.stats(request_id, num_waiting=len(self._jobs))

    def abort_all(self, reason: str) -> list[FromEngine]:
        """Fail everything under way, for the end of the process."""
        jobs, self._jobs = list(self._jobs), {}
        return [
            Failed(request_id=job, message=reason, is_user_error=False, code=ENDED_CODE)
            for job in jobs
        ]

    def _add(self, request: Encode) -> list[FromEngine]:
        problem = self._problem(request)
        if problem:
            return [_refuse(request.request_id, *problem)]
        types = request.token_types or [None] * len(request.sequences)
        prompt_tokens = sum(map(len, request.sequences))
        num = len(request.sequences)
        job = _Job(request, [b""] * num, num, prompt_tokens)
        self._counters.requests_total += 1
        self._counters.prompt_tokens_total += prompt_tokens
        if not num:
            return [Encoded(request_id=request.request_id, rows=[], prompt_tokens=0)]
        self._jobs[request.request_id] = job
        for i, (ids, kinds) in enumerate(zip(request.sequences, types, strict=True)):
            self._pieces.append(_Piece(job, i, ids, kinds))
        return []

    def _problem(self, request: Encode) -> tuple[str, str | None] | None:
        """Return (message, code) for a request that cannot be encoded."""
        limit, vocab_size = self.info.max_context, self.info.vocab_size
        if request.request_id in self._jobs:
            return f"request id {request.request_id!r} is already in use", None
        for i, ids in enumerate(request.sequences):
            if not ids:
                return f"sequence {i} is empty", None
            if len(ids) > limit:
                reason = f"sequence {i} has {len(ids)} tokens, the model takes at most {limit}"
                return reason, "context_length_exceeded"
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                return f"token id {bad} is outside the vocabulary of {vocab_size}", None
        if request.token_types is not None and list(map(len, request.token_types)) != list(
            map(len, request.sequences)
        ):
            return "token_types must have one entry for each token", None
        return None

    def _take_window(self) -> list[_Piece]:
        window: list[_Piece] = []
        tokens = 0
        while self._pieces and tokens < WINDOW_BATCHES * self._max_batch_tokens:
            window.append(self._pieces.popleft())
            tokens += len(window[-1])
        return window

    def _is_alive(self, piece: _Piece) -> bool:
        return self._jobs.get(piece.job.request.request_id) is piece.job

    def _encode(self, batch: list[_Piece]) -> list[bytes]:
        import torch

        has_types = batch[0].token_types is not None
        types = [piece.token_types or [] for piece in batch] if has_types else None
        with torch.inference_mode():
            rows_SD = self._model.encode([piece.token_ids for piece in batch], types)
            return [row.tobytes() for row in rows_SD.float().cpu().numpy()]

    def _deliver(self, batch: list[_Piece], rows: list[bytes]) -> list[FromEngine]:
        out: list[FromEngine] = []
        for piece, row in zip(batch, rows, strict=True):
            job = piece.job
            job.rows[piece.index] = row
            job.num_missing -= 1
            if not job.num_missing:
                request_id = job.request.request_id
                del self._jobs[request_id]
                out.append(
                    Encoded(
                        request_id=request_id,
                        rows=job.rows,
                        prompt_tokens=job.prompt_tokens,
                        device_s=job.device_s,
                    )
                )
        return out

    def _retry(self, batch: list[_Piece], error: Exception) -> list[FromEngine]:
        """Halve a batch that failed; a sequence that fails alone ends its request.

        Raises: ChipError when the device does not work any more.
        """
        from mxn.engine.devicecheck import check_device, first_line

        check_device(self._model.device, error)
        if len(batch) > 1:
            middle = len(batch) // 2
            self._batches.extendleft((batch[middle:], batch[:middle]))
            return []
        request_id = batch[0].job.request.request_id
        del self._jobs[request_id]
        reason = f"the model failed: {type(error).__name__}: {first_line(error)}"
        return [Failed(request_id=request_id, message=reason, is_user_error=False)]


def _refuse(request_id: str, message: str, code: str | None) -> Failed:
    return Failed(request_id=request_id, message=message, is_user_error=True, code=code)
