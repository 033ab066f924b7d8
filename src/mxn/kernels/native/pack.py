"""Matrices in the layout that native kernels read: quantized, in blocks of 16 output features.

Layouts are described at `Weight` in `csrc/common.h`. Shape letters: F output features, D input
features, G groups of D. Start at `pack`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from mxn.errors import UnsupportedError
from mxn.kernels.native.formats import WeightFormat
from mxn.kernels.native.library import library, pool
from mxn.kernels.native.memory import Arena

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LANES = 16
_LARGEST_ACTIVATION = 127  # of a quantized row
_arena = Arena()


@dataclass(slots=True)
class PackedWeight:
    """A matrix [F, D] as native kernels read it; owns its memory.

    A quantized value q means ``gain * (scale * q - min)``, or with no minimum
    ``gain * scale * (q - 8)`` for 4 bits, ``(q - 32)`` for 6 and ``(q - 128)`` for 8.
    """

    format: WeightFormat
    out_features: int
    in_features: int
    data: Tensor  # uint8
    scales: Tensor | None = None  # float16 [F / 16, G, 16]
    mins: Tensor | None = None  # float16 [F / 16, G, 16]
    bias: Tensor | None = None  # float32 [F padded]
    gain: float = 1.0
    handle: Any = field(default=None, repr=False)
    kernel: str = "native"

    def __post_init__(self) -> None:
        self._refuse_long_sums()
        self.handle = self._make_handle()

    @property
    def in_padded(self) -> int:
        return padded_width(self.in_features, self.format)

    @property
    def num_bytes(self) -> int:
        parts = (self.data, self.scales, self.mins, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def _refuse_long_sums(self) -> None:
        """Raises: UnsupportedError when the int32 sum of a group could overflow."""
        if not self.format.is_quantized:
            return
        largest = 2**self.format.bits - 1 if self.mins is not None else 2 ** (self.format.bits - 1)
        limit = (2**31 - 1) // (_LARGEST_ACTIVATION * largest)
        if (self.format.group or self.in_padded) > limit:
            raise UnsupportedError(
                f"a row of {self.in_features} columns with one scale; {self.format} sums up to "
                f"{limit} of them in 32 bits",
                hint="a format with a scale for each group of columns, such as int8-g128",
            )

    def _make_handle(self) -> Any:
        lib = library()
        weight = lib.Weight()
        names = {
            4: lib.Format.u4,
            6: lib.Format.u6,
            8: lib.Format.u8,
            16: lib.Format.bf16,
            32: lib.Format.f32,
        }
        weight.format = names[self.format.bits]
        weight.n, weight.k, weight.k_padded = self.out_features, self.in_features, self.in_padded
        weight.group = (self.format.group or self.in_padded) if self.format.is_quantized else 0
        weight.gain = self.gain
        weight.data = self.data.data_ptr()
        for name in ("scales", "mins", "bias"):
            part = getattr(self, name)
            if part is not None:
                setattr(weight, name, part.data_ptr())
        return weight

    def dequantize(self) -> Tensor:
        """Return float32 [F, D]: exactly what the kernels multiply by."""
        blocks = -(-self.out_features // LANES)
        if not self.format.is_quantized:
            dtype = torch.bfloat16 if self.format.bits == 16 else torch.float32
            wide = self.data.view(dtype).view(blocks, -1, LANES).transpose(1, 2)
            return wide.reshape(blocks * LANES, -1)[: self.out_features].float()
        values = _unpack(self.data, blocks, self.format.bits).float()
        assert self.scales is not None
        length = self.format.group or self.in_padded
        grouped = values.view(blocks * LANES, -1, length)
        if self.mins is None:
            whole = (grouped - 2 ** (self.format.bits - 1)) * _by_row(self.scales)
        else:
            whole = grouped * _by_row(self.scales) - _by_row(self.mins)
        flat = whole.view(blocks * LANES, -1) * self.gain
        return flat[: self.out_features, : self.in_features]


def padded_width(in_features: int, wanted: WeightFormat) -> int:
    """Return the stored columns: whole groups, and whole steps of the kernels."""
    step = max(wanted.group, LANES) if wanted.is_quantized else 1
    return -(-in_features // step) * step


def pack(weight_FD: Tensor, wanted: WeightFormat, bias_F: Tensor | None = None) -> PackedWeight:
    """Return `weight_FD` in the format `wanted`. The tensor itself is not kept."""
    out_features, in_features = weight_FD.shape
    blocks = -(-out_features // LANES)
    bias = _padded_bias(bias_F, blocks * LANES)
    if not wanted.is_quantized:
        dtype = torch.bfloat16 if wanted.bits == 16 else torch.float32
        wide = torch.zeros(blocks * LANES, in_features, dtype=dtype)
        wide[:out_features] = weight_FD
        data = _arena.empty(wide.nbytes)
        turned = wide.view(blocks, LANES, in_features).transpose(1, 2)
        data.view(dtype).view(blocks, in_features, LANES).copy_(turned)
        return PackedWeight(wanted, out_features, in_features, data, bias=bias)
    order = torch.full((blocks * LANES,), -1, dtype=torch.int64)
    order[:out_features] = torch.arange(out_features)
    return _quantize(weight_FD, order, out_features, wanted, bias)


def _quantize(
    weight_FD: Tensor, order: Tensor, out_features: int, wanted: WeightFormat, bias: Tensor | None
) -> PackedWeight:
    """Quantize the rows `order` of a matrix (-1: a row of zeros), 16 to a block."""
    in_features, blocks = weight_FD.shape[1], len(order) // LANES
    width = padded_width(in_features, wanted)
    group = wanted.group or width
    data = _arena.empty(len(order) * width * wanted.bits // 8)
    scales = torch.empty(blocks, width // group, LANES)
    mins = None if wanted.is_symmetric else torch.empty_like(scales)
    rows = weight_FD.float().contiguous()
    library().pack(
        pool(torch.get_num_threads()),
        rows.data_ptr(), rows.stride(0), order.data_ptr(), blocks, in_features, width, group,
        wanted.bits, data.data_ptr(), scales.data_ptr(), 0 if mins is None else mins.data_ptr(),
    )  # fmt: skip
    return assemble(wanted, out_features, in_features, data, scales, mins, bias)


def assemble(
    wanted: WeightFormat,
    out_features: int,
    in_features: int,
    data: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    bias: Tensor | None,
) -> PackedWeight:
    """Return a weight from interleaved values and float32 scales and minima [F / 16, G, 16].

    Scales are kept as float16 times a common power of two, so that none leaves its range: the
    largest becomes about 2^9, a minimum may be 64 times larger, and 2^23 times smaller ones keep
    all their bits.
    """
    top = _largest(scales)
    if mins is not None:
        top = max(top, _largest(mins) / 2**6)
    gain = 2.0 ** (math.ceil(math.log2(top)) - 9) if top > 0 else 1.0
    return PackedWeight(
        wanted,
        out_features,
        in_features,
        data,
        _kept_half(scales / gain),
        None if mins is None else _kept_half(mins / gain),
        bias,
        gain,
    )


def stack(parts: Sequence[PackedWeight], bias: Tensor | None = None) -> PackedWeight:
    """Join quantized weights of one width and group on the output dim, each of whole blocks.

    Where one has minima, all get them. `bias` is that of the whole. The parts are not needed
    any more; their scales keep all bits unless they are 2^23 times smaller than the largest.
    """
    first = parts[0]
    has_mins = any(part.mins is not None for part in parts)
    scales, mins = [], []
    for part in parts:
        assert part.scales is not None
        scales.append(part.scales.float() * part.gain)
        if part.mins is None:
            mins.append(scales[-1] * 2 ** (part.format.bits - 1))
        else:
            mins.append(part.mins.float() * part.gain)
    return assemble(
        replace(first.format, is_symmetric=not has_mins),
        sum(part.out_features for part in parts),
        first.in_features,
        torch.cat([part.data for part in parts]),
        torch.cat(scales),
        torch.cat(mins) if has_mins else None,
        bias,
    )


def _largest(values: Tensor) -> float:
    """Return the largest size of a finite value, 0 where there is none."""
    sizes = values.abs().nan_to_num(nan=0.0, posinf=0.0)
    return float(sizes.max()) if sizes.numel() else 0.0


def _kept_half(values: Tensor) -> Tensor:
    kept = _arena.empty(2 * values.numel()).view(torch.float16).view(values.shape)
    return kept.copy_(values)


def pack_glu(
    gate_up_2FD: Tensor, wanted: WeightFormat, bias_2F: Tensor | None = None
) -> PackedWeight:
    """Return gate and up as one matrix in which blocks of 16 rows of each take turns."""
    order = glu_order(len(gate_up_2FD) // 2)
    bias = None if bias_2F is None else taken(bias_2F, order)
    if wanted.is_quantized:
        return _quantize(gate_up_2FD, order, len(order), wanted, bias)
    return pack(taken(gate_up_2FD, order), wanted, bias)


def glu_order(width: int) -> Tensor:
    """Return which row of [gate, up] stands where: 16 of gate, 16 of up, …; -1 is padding."""
    blocks = -(-width // LANES)
    at = torch.arange(blocks * LANES).view(blocks, LANES)
    at = torch.where(at < width, at, -1)
    return torch.stack((at, torch.where(at < 0, -1, at + width)), dim=1).view(-1)


def taken(rows: Tensor, order: Tensor) -> Tensor:
    """Return `rows` in that order; -1 is a row of zeros."""
    found = rows[order.clamp(min=0)]
    found[order < 0] = 0
    return found


def _padded_bias(bias_F: Tensor | None, length: int) -> Tensor | None:
    if bias_F is None:
        return None
    bias = torch.zeros(length)
    bias[: len(bias_F)] = bias_F
    return bias


def interleave(values_FD: Tensor, bits: int) -> Tensor:
    """Return values of [F, D], one a byte, as flat blocks; F and D in 16s."""
    blocks = len(values_FD) // LANES
    if bits == 8:
        return values_FD.view(blocks, LANES, -1, 4).transpose(1, 2).reshape(-1)
    if bits == 4:
        parts = values_FD.view(blocks, LANES, -1, 2, 4).permute(3, 0, 2, 1, 4)
        return (parts[0] | (parts[1] << 4)).reshape(-1)
    quads = values_FD.view(blocks, LANES, -1, 4, 4).permute(
        3, 0, 2, 1, 4
    )  # [4, blocks, D / 16, 16, 4]
    lines = [quads[i] | (((quads[3] >> (2 * i)) & 3) << 6) for i in range(3)]
    return torch.stack(lines, dim=2).reshape(-1)


def _unpack(data: Tensor, blocks: int, bits: int) -> Tensor:
    """Return values [F, D] of interleaved blocks, one a byte."""
    if bits == 6:
        lines = data.view(blocks, -1, 3, LANES, 4).unbind(2)
        quads = [line & 63 for line in lines]
        quads.append(lines[0] >> 6 | (lines[1] >> 6 << 2) | (lines[2] >> 6 << 4))
        parts = torch.stack(quads, dim=2).flatten(1, 2)
        return parts.transpose(1, 2).reshape(blocks * LANES, -1)
    parts = data.view(blocks, -1, LANES, 4)
    if bits == 4:
        parts = torch.stack((parts & 15, parts >> 4), dim=2).flatten(1, 2)
    return parts.transpose(1, 2).reshape(blocks * LANES, -1)


def _by_row(scales: Tensor) -> Tensor:
    """Return [F, G, 1] from blocks."""
    return scales.float().transpose(1, 2).reshape(-1, scales.shape[1], 1)
