"""The neutral form of a quantized weight: what every reader of this package returns.

Knows numbers and shapes; knows no file format, no kernel and no model. Start at `QuantizedMatrix`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mxn.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """A weight [out, in] as small integers: ``w = scale * (value - zero)``, one scale per group.

    With `perm` (GPTQ act-order) the columns are stored in another order, so that groups are
    contiguous: column j of `values` belongs to ``x[..., perm[j]]``.
    """

    values: Tensor  # uint8 [out, in], one value per byte, less than 2 ** bits
    bits: int  # 4, 6 or 8: what the values need
    group: int  # columns per scale; `in` when there is one scale per row
    scales: Tensor  # float32 [out, in / group]; may be negative (GGUF Q4_0)
    zeros: Tensor  # uint8 or float32, like `scales`; in steps of the values, may lie outside them
    perm: Tensor | None = None  # int64 [in]

    def __post_init__(self) -> None:
        out_features, in_features = self.values.shape
        if self.bits not in (4, 6, 8):
            raise UnsupportedError(
                f"a quantized matrix has {self.bits!r} bits; 4, 6 and 8 are known"
            )
        if self.group < 1 or in_features % self.group:
            raise UnsupportedError(f"groups of {self.group} do not divide {in_features} columns")
        want = (out_features, in_features // self.group)
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != want:
                raise UnsupportedError(f"{name} are {list(tensor.shape)}, not {list(want)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] in float32, columns in the model's order."""
        import torch

        out_features, in_features = self.shape
        stored = self.values.view(out_features, -1, self.group).float()
        stored = stored.sub_(self.zeros.float().unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))
        stored = stored.view(out_features, in_features)
        if self.perm is None:
            return stored
        weight = torch.empty_like(stored)
        weight[:, self.perm] = stored
        return weight

    def rows(self, index: Tensor) -> QuantizedMatrix:
        """Return the rows `index` (int64) in that order."""
        return replace(
            self,
            values=self.values[index],
            scales=self.scales[index],
            zeros=self.zeros[index],
        )

    def regrouped(self, group: int) -> QuantizedMatrix:
        """Return the same numbers with smaller groups: scales and zeros are repeated.

        Raises: UnsupportedError if `group` does not divide the present one.
        """
        if self.group % group:
            raise UnsupportedError(f"groups of {self.group} cannot be cut into groups of {group}")
        times = self.group // group
        return replace(
            self,
            group=group,
            scales=self.scales.repeat_interleave(times, dim=1),
            zeros=self.zeros.repeat_interleave(times, dim=1),
        )

    @staticmethod
    def can_cat(parts: Sequence[QuantizedMatrix]) -> bool:
        """Whether `cat` can join these: as many columns each, in the same order."""
        first = parts[0]
        return all(
            part.shape[1] == first.shape[1] and _is_same_order(first.perm, part.perm)
            for part in parts
        )

    @staticmethod
    def cat(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
        """Join on the output dim, exactly: mixed parts get the smallest group and most bits.

        Raises: UnsupportedError when widths or column orders differ (see `can_cat`).
        """
        import torch

        if not QuantizedMatrix.can_cat(parts):
            widths = [part.shape[1] for part in parts]
            raise UnsupportedError(
                f"matrices with {widths} columns cannot be joined"
                if len(set(widths)) > 1
                else "matrices with different act-order permutations cannot be joined",
                hint="keep them as separate products",
            )
        if len(parts) == 1:
            return parts[0]
        group = math.gcd(*(part.group for part in parts))
        parts = [part.regrouped(group) for part in parts]
        zeros = [part.zeros for part in parts]
        if any(zero.is_floating_point() for zero in zeros):
            zeros = [zero.float() for zero in zeros]
        return QuantizedMatrix(
            values=torch.cat([part.values for part in parts]),
            bits=max(part.bits for part in parts),
            group=group,
            scales=torch.cat([part.scales for part in parts]),
            zeros=torch.cat(zeros),
            perm=parts[0].perm,
        )


def _is_same_order(first: Tensor | None, second: Tensor | None) -> bool:
    import torch

    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def compact_zeros(zeros: Tensor) -> Tensor:
    """Return integer zeros as uint8 where they fit, else as float32 (GPTQ v1 may store 256)."""
    import torch

    low, high = (int(zeros.min()), int(zeros.max())) if zeros.numel() else (0, 0)
    return zeros.to(torch.uint8 if low >= 0 and high <= 255 else torch.float32)
