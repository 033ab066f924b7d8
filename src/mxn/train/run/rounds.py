"""Blocks of time over several rounds of a measurement, and how sure their mean is.

A machine with neighbours changes its speed in plateaus that last for seconds, longer than one case
is measured at a time. So what is measured is gone through again, round after round, until the
rounds agree or the time that was given is over. Knows no clock, layers or ranks. Start at `Rounds`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from mxn.train.run.layer_times import Block, cost_of, longest_s, spread
from mxn.train.run.stored import Reading

SURE = 0.01
"""Standard error of the mean of a round, as a share of it, that is small enough."""
_FEWEST = 4  # rounds that say how sure they are: two or three agree by chance too often

Case = tuple[str, int, int]
"""Kind of layer, rows of a micro-batch, width of tensor parallelism."""


@dataclass(slots=True)
class Rounds:
    """What one rank measured of each case, round after round."""

    kept: dict[Case, float] = field(default_factory=dict)  # bytes of activations of a layer
    _rounds: list[dict[Case, tuple[Block, ...]]] = field(default_factory=list)

    def begin(self) -> None:
        """Begin the next round."""
        self._rounds.append({})

    def add(self, case: Case, blocks: tuple[Block, ...]) -> None:
        """Take the blocks of a case in this round."""
        self._rounds[-1][case] = blocks

    @property
    def are_enough(self) -> bool:
        """Return whether the time of all cases together is known to `SURE`."""
        found = [self._means(case) for case in self._cases()]
        if not found:
            return True  # nothing here was wide enough to be measured
        totals = [sum(filter(None, means)) for means in zip(*found, strict=True) if all(means)]
        return len(totals) >= _FEWEST and _error(totals) <= SURE

    def readings(self) -> tuple[Reading, ...]:
        """Return what each case costs, by the blocks of all rounds."""
        return tuple(map(self._reading, self._cases()))

    def _cases(self) -> tuple[Case, ...]:
        return tuple(self._rounds[0]) if self._rounds else ()

    def _blocks(self, case: Case) -> list[list[Block]]:
        """Return the blocks of a case by round, without those in which the process stood still."""
        most_s = longest_s([block for found in self._rounds for block in found[case]])
        return [
            [block for block in found[case] if block.each_s <= most_s] for found in self._rounds
        ]

    def _means(self, case: Case) -> list[float | None]:
        """Return the mean of each round, None for one that stood still all the time."""
        return [_passes_s(blocks) if blocks else None for blocks in self._blocks(case)]

    def _reading(self, case: Case) -> Reading:
        kind, micro_batch, tp = case
        blocks = [block for of_round in self._blocks(case) for block in of_round]
        means = [mean for mean in self._means(case) if mean is not None]
        return Reading(
            kind=kind, micro_batch=micro_batch, tp=tp, cost=cost_of(blocks, self.kept[case]),
            noise=spread([block.passes_s for block in blocks]), repeats=len(blocks),
            stopped=sum(len(found[case]) for found in self._rounds) - len(blocks),
            error=_error(means) if len(means) > 1 else None,
        )  # fmt: skip


def _passes_s(blocks: Sequence[Block]) -> float:
    return statistics.fmean(block.passes_s for block in blocks)


def _error(means: Sequence[float]) -> float:
    """Return the standard error of the mean of several rounds, as a share of it.

    Each round counts as one value: the blocks of one are close in time and err alike.
    """
    return statistics.stdev(means) / len(means) ** 0.5 / statistics.fmean(means)
