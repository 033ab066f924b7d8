"""Matrices in the layout that native kernels read: quantized, in blocks of 16 output features.

Layouts are described at `Weight` in `csrc/common.h`. Shape letters: F output features, D input
features, G groups of D. Start at `pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mxn.kernels.native.formats import WeightFormat
from mxn.kernels.native.library import library

if TYPE_CHECKING:
    from torch import Tensor

LANES = 16
_ROWS_AT_ONCE = 2048  # quantized in pieces that a cache holds
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range; the one with the least error is kept


@dataclass(slots=True)
class PackedWeight:
    """A matrix [F, D] as native kernels read it; owns its memory.

    A quantized value q means ``gain * (scale * q - min)``, or with no minimum
    ``gain * scale * (q - 8)`` for 4 bits and ``(q - 128)`` for 8.
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
        self.handle = self._make_handle()

    @property
    def in_padded(self) -> int:
        return padded_width(self.in_features, self.format)

    @property
    def num_bytes(self) -> int:
        parts = (self.data, self.scales, self.mins, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def _make_handle(self) -> Any:
        lib = library()
        weight = lib.Weight()
        names = {4: lib.Format.u4, 8: lib.Format.u8, 16: lib.Format.bf16, 32: lib.Format.f32}
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
        data = wide.view(blocks, LANES, in_features).transpose(1, 2).contiguous()
        return PackedWeight(
            wanted, out_features, in_features, data.view(torch.uint8).view(-1), bias=bias
        )
    width = padded_width(in_features, wanted)
    data = torch.empty(blocks * LANES * width * wanted.bits // 8, dtype=torch.uint8)
    num_groups = width // (wanted.group or width)
    scales = torch.empty(blocks * LANES, num_groups)
    mins = None if wanted.is_symmetric else torch.empty(blocks * LANES, num_groups)
    row_bytes = width * wanted.bits // 8
    for start in range(0, blocks * LANES, _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, blocks * LANES)
        part = torch.zeros(end - start, width)
        here = weight_FD[start:end]
        part[: len(here), :in_features] = here
        values, part_scales, part_mins = _quantize(part, wanted, num_groups)
        scales[start:end] = part_scales
        if mins is not None:
            mins[start:end] = part_mins
        data[start * row_bytes : end * row_bytes] = interleave(values, wanted.bits)
    return assemble(wanted, out_features, in_features, data, scales, mins, bias)


def assemble(
    wanted: WeightFormat,
    out_features: int,
    in_features: int,
    data: Tensor,
    scales_FG: Tensor,
    mins_FG: Tensor | None,
    bias: Tensor | None,
) -> PackedWeight:
    """Return a weight from interleaved values and float32 scales of rows padded to 16.

    Scales are kept as float16 times a common power of two, so that none leaves its range.
    """
    top = float(scales_FG.abs().max()) if scales_FG.numel() else 0.0
    if mins_FG is not None and mins_FG.numel():
        top = max(top, float(mins_FG.abs().max()) / 2**6)
    gain = 2.0 ** torch.tensor(top).log2().ceil().item() if 0 < top < float("inf") else 1.0
    return PackedWeight(
        wanted,
        out_features,
        in_features,
        data,
        _by_block(scales_FG / gain),
        None if mins_FG is None else _by_block(mins_FG / gain),
        bias,
        gain,
    )


def pack_glu(
    gate_FD: Tensor, up_FD: Tensor, wanted: WeightFormat, bias_2F: Tensor | None = None
) -> PackedWeight:
    """Return gate and up as one matrix in which blocks of 16 rows of each take turns."""
    rows = glu_rows(gate_FD, up_FD)
    bias = None if bias_2F is None else glu_rows(*bias_2F.unsqueeze(1).chunk(2)).squeeze(1)
    return pack(rows, wanted, bias)


def glu_rows(gate_FX: Tensor, up_FX: Tensor) -> Tensor:
    """Return [2 * F padded to 16, X]: 16 rows of gate, 16 of up, and so on."""
    blocks = -(-len(gate_FX) // LANES)
    rows = gate_FX.new_zeros(blocks, 2, LANES, gate_FX.shape[1])
    for i, part in enumerate((gate_FX, up_FX)):
        whole, rest = divmod(len(part), LANES)
        rows[:whole, i] = part[: whole * LANES].view(whole, LANES, -1)
        if rest:
            rows[whole, i, :rest] = part[whole * LANES :]
    return rows.view(2 * blocks * LANES, -1)


def _padded_bias(bias_F: Tensor | None, length: int) -> Tensor | None:
    if bias_F is None:
        return None
    bias = torch.zeros(length)
    bias[: len(bias_F)] = bias_F
    return bias


def _quantize(
    part_FD: Tensor, wanted: WeightFormat, num_groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return uint8 values [F, D], scales [F, G] and minima [F, G] (None when symmetric)."""
    grouped = part_FD.view(len(part_FD), num_groups, -1)
    if wanted.bits == 8:
        scale = grouped.abs().amax(-1) / 127
        values = (grouped / _nonzero(scale).unsqueeze(-1)).round_().clamp_(-127, 127) + 128
        return values.view_as(part_FD).to(torch.uint8), scale, None
    best = _search(grouped, _symmetric4 if wanted.is_symmetric else _asymmetric4)
    return best[0].view_as(part_FD).to(torch.uint8), best[1], best[2]


def _search(grouped: Tensor, quantize: Any) -> Sequence[Any]:
    """Return the values, scales and minima with the least squared error over some clippings."""
    best_error: Tensor | None = None
    best: list[Any] = []
    for shrink in _SHRINK:
        values, scale, low, restored = quantize(grouped, shrink)
        error = restored.sub_(grouped).square_().sum(-1)
        if best_error is None:
            best_error, best = error, [values, scale, low]
            continue
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best[0] = torch.where(is_better.unsqueeze(-1), values, best[0])
        best[1] = torch.where(is_better, scale, best[1])
        if low is not None:
            best[2] = torch.where(is_better, low, best[2])
    return best


def _symmetric4(grouped: Tensor, shrink: float) -> tuple[Tensor, Tensor, None, Tensor]:
    """The value of largest size becomes -8, so that the scale may be negative."""
    at = grouped.abs().argmax(-1, keepdim=True)
    scale = (grouped.gather(-1, at) * (shrink / -8)).half().float()
    values = (grouped / _nonzero(scale)).round_().clamp_(-8, 7)
    return values + 8, scale.squeeze(-1), None, values * scale


def _asymmetric4(grouped: Tensor, shrink: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low = grouped.amin(-1, keepdim=True).clamp_(max=0) * shrink
    high = grouped.amax(-1, keepdim=True).clamp_(min=0) * shrink
    scale = (high - low) / 15
    values = ((grouped - low) / _nonzero(scale)).round_().clamp_(0, 15)
    return values, scale.squeeze(-1), -low.squeeze(-1), values * scale + low


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def interleave(values_FD: Tensor, bits: int) -> Tensor:
    """Return values of [F, D], one a byte, as flat blocks; F in 16s, D in 4s (8 bits) or 8s."""
    blocks = len(values_FD) // LANES
    if bits == 8:
        return values_FD.view(blocks, LANES, -1, 4).transpose(1, 2).reshape(-1)
    parts = values_FD.view(blocks, LANES, -1, 2, 4).permute(3, 0, 2, 1, 4)
    return (parts[0] | (parts[1] << 4)).reshape(-1)


def _unpack(data: Tensor, blocks: int, bits: int) -> Tensor:
    """Return values [F, D] of interleaved blocks, one a byte."""
    parts = data.view(blocks, -1, LANES, 4)
    if bits == 4:
        parts = torch.stack((parts & 15, parts >> 4), dim=2).flatten(1, 2)
    return parts.transpose(1, 2).reshape(blocks * LANES, -1)


def _by_block(scales_FG: Tensor) -> Tensor:
    return scales_FG.view(-1, LANES, scales_FG.shape[1]).transpose(1, 2).half().contiguous()


def _by_row(scales: Tensor) -> Tensor:
    """Return [F, G, 1] from blocks."""
    return scales.float().transpose(1, 2).reshape(-1, scales.shape[1], 1)
