"""How fast a replica is: usual times of first tokens and gaps, and its capacity for weights.

The gap between two tokens of a stream is fitted as a + b × requests in flight, with old samples
fading. So replicas are compared at the same load: raw throughput would only repeat how much traffic
they were given. Pure; times come in as arguments.
"""

from __future__ import annotations

import math

FADE_S = 2.0  # samples count 1/e after this time, when there are newer ones
_EWMA = 0.2
# Where all samples have the same load, this share of the gap is taken to grow with it.
_LOAD_SHARE = 0.7
# A replica that has just slowed down had low gaps at high loads, which looks as if load helped.
_LEAST_SLOPE = 0.5
_PRIOR_VARIANCE = 0.25  # how much the load must vary before the fit believes what it sees


class Speed:
    """Measurements of one replica. None: not measured yet."""

    __slots__ = (
        "_at_s",
        "_gap",
        "_load",
        "_load2",
        "_load_gap",
        "_weight",
        "delta_gap_s",
        "first_token_s",
        "prefill_token_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.first_token_s: float | None = None
        self.prefill_token_s: float | None = None  # for each token that was not cached
        self.delta_gap_s: float | None = None  # between two deltas of a stream, of any size
        self._at_s = 0.0
        self._weight = self._load = self._load2 = self._gap = self._load_gap = 0.0

    def first_token(self, waited_s: float, new_tokens: int) -> None:
        """A first delta came; `new_tokens` are the prompt's without the cached ones."""
        self.first_token_s = _blend(self.first_token_s, waited_s)
        self.prefill_token_s = _blend(self.prefill_token_s, waited_s / max(1, new_tokens))

    def tokens(
        self, now_s: float, took_s: float, num_tokens: int, num_deltas: int, load: float
    ) -> None:
        """A stream got `num_tokens` in `took_s`, with `load` requests in flight meanwhile."""
        self.delta_gap_s = _blend(self.delta_gap_s, took_s / num_deltas)
        fade = math.exp((self._at_s - now_s) / FADE_S)
        self._at_s = now_s
        gap_s = took_s / num_tokens
        # By time and not by tokens, or a replica that slows down would hardly be heard.
        self._weight = self._weight * fade + took_s
        self._load = self._load * fade + took_s * load
        self._load2 = self._load2 * fade + took_s * load * load
        self._gap = self._gap * fade + took_s * gap_s
        self._load_gap = self._load_gap * fade + took_s * load * gap_s

    @property
    def mean_load(self) -> float | None:
        """Requests in flight during the recent samples."""
        return self._load / self._weight if self._weight else None

    def gap_at(self, load: float) -> float | None:
        """Return the expected seconds between two tokens of a stream with `load` in flight."""
        if not self._weight:
            return None
        mean_load = self._load / self._weight
        mean_gap = self._gap / self._weight
        variance = max(0.0, self._load2 / self._weight - mean_load**2)
        covariance = self._load_gap / self._weight - mean_load * mean_gap
        assumed = _LOAD_SHARE * mean_gap / max(mean_load, 1.0)
        prior = _PRIOR_VARIANCE
        slope = (covariance + prior * assumed) / (variance + prior)
        steepest = mean_gap / max(mean_load, 1.0)
        slope = min(max(slope, _LEAST_SLOPE * steepest), steepest)
        return mean_gap + slope * (load - mean_load)

    def capacity(self, load: float) -> float | None:
        """Return tokens per second of all streams together with `load` requests in flight."""
        gap_s = self.gap_at(load)
        return None if not gap_s else load / gap_s


def _blend(before: float | None, value: float) -> float:
    return value if before is None else before + _EWMA * (value - before)
