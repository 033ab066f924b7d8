"""Measures one stream on one replica: its first token and its rate, for the choice of the next one.

Knows a seat and its deltas, not the request. What is charged is counted in `metering.py`.
"""

from __future__ import annotations

from mxn.engine.protocol import Delta
from mxn.serve.fleet import Clock, Seat

_MEASURE_S = 0.25  # of a stream between two notes to the replica's measurements


class Meter:
    """Measures one stream on one replica, a few notes each second."""

    __slots__ = (
        "_clock", "_last_s", "_load", "_new_tokens", "_noted_s", "_num_deltas", "_num_tokens",
        "_sent_s", "_took_s", "is_first", "seat",
    )  # fmt: skip

    def __init__(self, seat: Seat, prompt_tokens: int, clock: Clock) -> None:
        self.seat = seat
        self.is_first = True
        self._clock = clock
        self._new_tokens = prompt_tokens
        self._load = float(seat.load)
        self._sent_s = self._last_s = self._noted_s = clock()
        self._took_s, self._num_tokens, self._num_deltas = 0.0, 0, 0

    def note(self, delta: Delta, waited_s: float) -> None:
        """Count a delta. One that had come before it was asked for says nothing of the replica."""
        now_s = self._clock()
        self.seat.num_tokens += len(delta.token_ids)
        if self.is_first:
            self.is_first = False
            new_tokens = self._new_tokens - delta.cached_tokens
            self.seat.speed.first_token(now_s - self._sent_s, new_tokens)
        elif 2 * waited_s >= now_s - self._last_s:
            self._took_s += now_s - self._last_s
            self._num_tokens += len(delta.token_ids)
            self._num_deltas += 1
        self._last_s = now_s
        if now_s - self._noted_s >= _MEASURE_S or delta.finish_reason is not None:
            self._write(now_s)

    def _write(self, now_s: float) -> None:
        self._noted_s = now_s
        load = float(self.seat.load)
        if self._num_tokens and self._took_s > 0:
            mean_load = (self._load + load) / 2
            self.seat.speed.tokens(
                now_s, self._took_s, self._num_tokens, self._num_deltas, mean_load
            )
        self._load = load
        self._took_s, self._num_tokens, self._num_deltas = 0.0, 0, 0
