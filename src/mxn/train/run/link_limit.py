"""A link made slower than it is, for tests and emulation. Pure: the clock comes as an argument."""

from __future__ import annotations

from dataclasses import dataclass

from mxn.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimit:
    """A slower link than there is, for tests and emulation: what goes to one peer shares it."""

    bytes_per_s: float = float("inf")
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.latency_s < 0:
            raise UserError(
                f"a link limit needs bytes_per_s > 0 and latency_s >= 0, got {self.bytes_per_s!r} "
                f"and {self.latency_s!r}"
            )


class TokenBucket:
    """When the next bytes may have arrived over a limited link. The clock comes as an argument."""

    def __init__(self, limit: LinkLimit) -> None:
        self._limit = limit
        self._free_at = 0.0

    def arrival_s(self, num_bytes: int, now_s: float) -> float:
        """Book a message and return when its last byte arrives. Latency does not occupy the link"""
        self._free_at = max(now_s, self._free_at) + num_bytes / self._limit.bytes_per_s
        return self._free_at + self._limit.latency_s
