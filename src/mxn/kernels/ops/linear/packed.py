"""Packed weights of `linear`: what their numbers mean, how to make and to expand them.

Nothing is chosen or fast here: kernels read the fields. `dequantized()` is the truth of a format.

Shape letters: D in features, F out features, g groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.errors import ConfigError

GROUP_SIZES = (128, 64, 32)
LEAST_SCALE = 2.0**-126  # of a row that is not zero: the inverse of a smaller one may be infinite


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """Unsigned 4-bit numbers with a scale and a zero point for each group of a row.

    weight = (number - zero) * scale. Byte i of a group holds number i (low half) and number
    group_size / 2 + i (high half).
    """

    values: Tensor  # uint8 [F, D / 2]
    scales: Tensor  # float32 [F, g]
    zeros: Tensor  # uint8 [F, g], 0 to 15
    group_size: int

    @classmethod
    def quantize(cls, weight_FD: Tensor, group_size: int = 128) -> Int4Weight:
        """Round to the nearest number between each group's least and largest value (and 0).

        Raises: ConfigError for a group size that is not provided or does not divide D.
        """
        out_features, in_features = weight_FD.shape
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ConfigError(
                f"int4 groups of {group_size!r} do not fit {in_features} in features",
                hint=f"group sizes are {', '.join(map(str, GROUP_SIZES))} and must divide them",
            )
        grouped = weight_FD.float().reshape(out_features, -1, group_size)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        zeros = (-low / scales).round().clamp(0, 15)
        numbers = (grouped / scales[..., None]).round() + zeros[..., None]
        return cls.pack(numbers.clamp(0, 15).to(torch.uint8), scales, zeros.to(torch.uint8))

    @classmethod
    def pack(cls, numbers_Fgn: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
        """Pack numbers [F, g, group_size] uint8 of 0 to 15, as importers have them."""
        low, high = numbers_Fgn.chunk(2, dim=-1)
        values = (low | (high << 4)).flatten(1).contiguous()
        return cls(values, scales.float().contiguous(), zeros.contiguous(), numbers_Fgn.shape[-1])

    def dequantized(self) -> Tensor:
        """Return the weight [F, D] in float32."""
        grouped = self.values.unflatten(1, (-1, self.group_size // 2))
        numbers = torch.cat((grouped & 15, grouped >> 4), dim=-1).float()
        return ((numbers - self.zeros[..., None].float()) * self.scales[..., None]).flatten(1)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """Signed 8-bit numbers, -127 to 127, with a scale for each out feature."""

    values: Tensor  # int8 [F, D]
    scales: Tensor  # float32 [F]

    @classmethod
    def quantize(cls, weight_FD: Tensor) -> Int8Weight:
        values, scales = quantize_rows(weight_FD)
        return cls(values, scales)

    def dequantized(self) -> Tensor:
        """Return the weight [F, D] in float32."""
        return self.values.float() * self.scales[:, None]


def quantize_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [M, D] (to nearest even) and float32 scales [M] = largest magnitude / 127.

    The inverse of the scale multiplies, as in the kernels, so that both round alike. Numbers so
    small that the scale would be subnormal lose digits or become zero.
    """
    wide = x_MD.float()
    scales = wide.abs().amax(-1) / 127
    scales = torch.where((scales > 0) & (scales < LEAST_SCALE), LEAST_SCALE, scales)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (wide * inverse[:, None]).round().to(torch.int8), scales
