"""What a stage of a pipeline does: the words that schedules, simulator and executor share.

Knows no schedule and no times. Start at `Action`; `schedules.order` makes rows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """One pass of one chunk over one micro-batch.

    `F` forward, `B` backward, `W` weight gradients. A `B` makes both kinds of gradients, except
    where its row has a `W` of the same chunk and micro-batch: then it makes those of the inputs.
    """

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f" of chunk {self.chunk}" if self.chunk else "")


Row = tuple[Action, ...]
"""Of one stage, first action first."""
Order = tuple[Row, ...]
"""By stage."""


def split_backwards(row: Row) -> frozenset[tuple[int, int]]:
    """Return (chunk, micro-batch) of each backward that is split: its `B` is the input half."""
    return frozenset((chunk, micro_batch) for kind, chunk, micro_batch in row if kind == "W")


def stored_peak(row: Row, sizes: Sequence[float] | None = None) -> float:
    """Return the most that a row stores at once of its passes' activations.

    `sizes` is what one micro-batch keeps in each chunk, for example bytes; without it passes are
    counted. Kept from the forward to the last backward action: what a split backward still needs
    for its weight half is taken as all.
    """
    split = split_backwards(row)
    stored = peak = 0.0
    for kind, chunk, micro_batch in row:
        size = 1 if sizes is None else sizes[chunk]
        if kind == "F":
            stored += size
            peak = max(peak, stored)
        elif kind == "W" or (chunk, micro_batch) not in split:
            stored -= size
    return peak
