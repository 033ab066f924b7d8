"""The seconds of one pipeline, as the simulator wants them: passes and hops of a micro-batch.

Numbers only; `simulate` makes them from profiles and links. Start at `PipelineTimes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mxn.errors import ConfigError

# Of sums of layers: where a backward is all weights, both seconds are equal but for this.
_ROUNDING_S = 1e-9


class Hop(NamedTuple):
    """One message over one boundary, in one direction, in seconds.

    A message that flows beside the passes has `link_s` only. What holds up the sender's passes is
    `send_s`: a send that blocks has its whole time there and no `link_s`. A receiver stands still
    for at least `receive_s` before the pass that needs the message.
    """

    link_s: float = 0.0
    send_s: float = 0.0
    receive_s: float = 0.0

    @classmethod
    def blocking(cls, seconds: float) -> Hop:
        """Return a hop for which both ends stand still while the message is under way."""
        return cls(0.0, seconds, seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """Seconds of one micro-batch. Rows are [stage][chunk]; part p is chunk p // S of stage p % S.

    `backward_s` is both halves, `weight_s` the one of them that may wait. `forward_hops[p]` is from
    part p to p + 1, `backward_hops[p]` from part p + 1 to p.
    """

    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    weight_s: tuple[tuple[float, ...], ...]
    forward_hops: tuple[Hop, ...]
    backward_hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.forward_s]
        if not shape or len(set(shape)) != 1 or not shape[0]:
            raise ConfigError(f"stages have {shape} chunks, expected the same number, at least 1")
        for name, rows in (("backward_s", self.backward_s), ("weight_s", self.weight_s)):
            if [len(row) for row in rows] != shape:
                raise ConfigError(f"{name} has another shape than forward_s")
        borders = len(shape) * shape[0] - 1
        if len(self.forward_hops) != borders or len(self.backward_hops) != borders:
            raise ConfigError(
                f"{len(self.forward_hops)} forward and {len(self.backward_hops)} backward hops "
                f"for {borders} boundaries"
            )
        self._check_seconds()

    def _check_seconds(self) -> None:
        """A weight half is a part of its backward, and nothing ends before it begins."""
        rows = zip(self.forward_s, self.backward_s, self.weight_s, strict=True)
        for stage, (forward, backward, weight) in enumerate(rows):
            for f, b, w in zip(forward, backward, weight, strict=True):
                if not (f >= 0 and 0 <= w <= b + _ROUNDING_S):
                    raise ConfigError(
                        f"stage {stage} has forward {f!r} s, backward {b!r} s, weight half {w!r} s",
                        hint="seconds are at least 0, and the weight half is part of the backward",
                    )
        for hop in (*self.forward_hops, *self.backward_hops):
            if not min(hop) >= 0:
                raise ConfigError(f"a hop takes {tuple(hop)!r} s, seconds are at least 0")

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    @property
    def num_chunks(self) -> int:
        return len(self.forward_s[0])

    @classmethod
    def even(
        cls,
        num_stages: int,
        *,
        forward_s: float,
        backward_s: float,
        weight_s: float | None = None,
        num_chunks: int = 1,
        hop: Hop = Hop(),
    ) -> PipelineTimes:
        """Return equal stages; seconds are of a chunk. `weight_s`: half of `backward_s`."""
        weight = backward_s / 2 if weight_s is None else weight_s
        hops = (hop,) * (num_stages * num_chunks - 1)
        rows = ((second,) * num_chunks for second in (forward_s, backward_s, weight))
        forward, backward, weights = ((row,) * num_stages for row in rows)
        return cls(
            forward_s=forward,
            backward_s=backward,
            weight_s=weights,
            forward_hops=hops,
            backward_hops=hops,
        )
