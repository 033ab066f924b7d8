"""Blocks of time over several rounds of a measurement, and how sure their mean is.

A machine with neighbours changes its speed in plateaus that last for seconds, longer than one case
is measured at a time. So what is measured is gone through again, round after round, until the
rounds agree or the time that was given is over. Knows no clock, layers or ranks. Start at `Rounds`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from mxn.train.run.layer_times import Block, cost_of, spread
from mxn.train.run.stored import Reading

SURE = 0.01
"""Standard error of the mean of a round, as a share of it, that is small enough."""

Case = tuple[str, int, int]
"""Kind of layer, rows of a micro-batch, width of tensor parallelism."""


@dataclass(slots=True)
class Rounds:
    """What one rank measured of each case, round after round."""

    kept: dict[Case, float] = field(default_factory=dict)  # bytes of activations of a layer
    blocks: dict[Case, list[Block]] = field(default_factory=dict)
    _totals: list[float] = field(default_factory=list)  # seconds of all cases, of each round

    def begin(self) -> None:
        """Begin the next round."""
        self._totals.append(0.0)

    def add(self, case: Case, blocks: tuple[Block, ...]) -> None:
        """Take the blocks of a case in this round."""
        self.blocks.setdefault(case, []).extend(blocks)
        self._totals[-1] += statistics.fmean(block.passes_s for block in blocks)

    @property
    def num_rounds(self) -> int:
        return len(self._totals)

    @property
    def error(self) -> float | None:
        """Return the standard error of a mean over rounds, as a share of it; None for one round.

        Each round counts as one: the blocks of one are close in time and err alike.
        """
        if not any(self._totals):
            return 0.0  # nothing here was wide enough to be measured
        if len(self._totals) < 2:
            return None
        deviation = statistics.stdev(self._totals) / len(self._totals) ** 0.5
        return deviation / statistics.fmean(self._totals)

    def readings(self) -> tuple[Reading, ...]:
        """Return what each case costs."""
        return tuple(
            Reading(
                kind=kind, micro_batch=micro_batch, tp=tp,
                cost=cost_of(blocks, self.kept[kind, micro_batch, tp]),
                noise=spread([block.passes_s for block in blocks]), repeats=len(blocks),
            )
            for (kind, micro_batch, tp), blocks in self.blocks.items()
        )  # fmt: skip
