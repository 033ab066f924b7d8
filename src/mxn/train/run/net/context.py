"""What all layers of a micro-batch share: rotary angles of its positions, masks of its segments.

Made once for a forward pass and given to each layer. Knows no weights. Start at `Context`.
Shape letters: R rows, T tokens of a row, P half the rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.models.spec import RopeSpec
from mxn.train.run.data.batch import MicroBatch


class RopeTables:
    """cos and sin by position for each kind of rotation, on one device.

    Computed on the host in float32: chips differ in these functions by more than training forgives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[RopeSpec, tuple[Tensor, Tensor]] = {}

    def at(self, spec: RopeSpec, positions_RT: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [R, T, 1, P], float32; no position is above the length of a row."""
        length = positions_RT.shape[1]
        if spec not in self._tables or len(self._tables[spec][0]) < length:
            self._tables[spec] = self._make(spec, length)
        cos, sin = self._tables[spec]
        return cos[positions_RT].unsqueeze(2), sin[positions_RT].unsqueeze(2)

    def _make(self, spec: RopeSpec, length: int) -> tuple[Tensor, Tensor]:
        inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)
        cos, sin = angles.cos() * spec.scale, angles.sin() * spec.scale
        return cos.to(self._device), sin.to(self._device)


class Context:
    """Angles and masks of one micro-batch, made when a layer first asks."""

    def __init__(self, batch: MicroBatch, tables: RopeTables) -> None:
        self.batch = batch
        self._tables = tables
        self._angles: dict[RopeSpec, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}

    def angles(self, spec: RopeSpec) -> tuple[Tensor, Tensor]:
        if spec not in self._angles:
            self._angles[spec] = self._tables.at(spec, self.batch.positions)
        return self._angles[spec]

    def is_plain_causal(self, window: int | None) -> bool:
        """Whether each token sees all before it in its row: then no mask needs to be made."""
        length = self.batch.ids.shape[1]
        return not self.batch.is_packed and (window is None or window >= length)

    def mask(self, window: int | None) -> Tensor:
        """Return which token (dim 2) sees which (dim 3): bool [R, 1, T, T]."""
        if window not in self._masks:
            self._masks[window] = _mask(self.batch, window)
        return self._masks[window]


def _mask(batch: MicroBatch, window: int | None) -> Tensor:
    length = batch.ids.shape[1]
    at = torch.arange(length, device=batch.ids.device)
    distance_TT = at.unsqueeze(1) - at.unsqueeze(0)
    seen_TT = distance_TT >= 0
    if window is not None:
        seen_TT = seen_TT & (distance_TT < window)
    same_RTT = batch.segments.unsqueeze(2) == batch.segments.unsqueeze(1)
    return (same_RTT & seen_TT).unsqueeze(1)
