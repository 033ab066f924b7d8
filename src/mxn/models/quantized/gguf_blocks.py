"""ggml's block formats as quantized matrices. Knows bytes; knows no file and no model.

Each function takes raw blocks uint8 [out, blocks, bytes]. d and m are half floats, nibbles lie
split: the low halves of n bytes are the first n values, the high halves the next.
Source: ggml-quants.c and the table of block types in ggml's documentation. Start at `to_matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mxn.models.quantized.matrix import QuantizedMatrix

if TYPE_CHECKING:
    from torch import Tensor

# values uint8 [out, blocks, n], scales and zeros [out, blocks, groups of the block]
Parts = tuple["Tensor", "Tensor", "Tensor"]

# What the nibbles of IQ4_NL and IQ4_XS stand for: unevenly spaced, so 8 bits hold them.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

PLAIN = ("F32", "F16", "BF16")


def to_matrix(kind: str, raw: Tensor) -> QuantizedMatrix:
    """Return blocks of type `kind` (not a plain one) as a matrix. `raw`: [out, blocks, bytes]."""
    bits, unpack = _UNPACK[kind]
    values, scales, zeros = unpack(raw)
    rows = raw.shape[0]
    group = values.shape[-1] // scales.shape[-1]
    return QuantizedMatrix(
        values=values.reshape(rows, -1),
        bits=bits,
        group=group,
        scales=scales.reshape(rows, -1),
        zeros=zeros.reshape(rows, -1),
    )


def to_plain(kind: str, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of type F32, F16 or BF16 from its bytes; a copy, aligned."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return raw.clone().view(dtype).view(shape)


def _half(raw: Tensor, start: int) -> Tensor:
    """Return a half float of each block as float32 [out, blocks, 1]."""
    import torch

    return raw[..., start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Return [..., n] bytes as [..., 2 n] values."""
    import torch

    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _bit_rows(raw: Tensor, count: int) -> Tensor:
    """Return bit j of each of n bytes as [..., count, n], for j below `count`."""
    import torch

    shifts = torch.arange(count, dtype=torch.uint8).unsqueeze(-1)
    return (raw.unsqueeze(-2) >> shifts) & 1


def _fifth_bits(raw: Tensor) -> Tensor:
    """Return bit i of a 32-bit word as value i, in place 4: [..., 4] -> [..., 32]."""
    bits = _bit_rows(raw, 8).transpose(-1, -2)  # [..., byte, bit]
    return bits.reshape(*raw.shape[:-1], 32) << 4


def _constant(scales: Tensor, zero: int) -> Tensor:
    import torch

    return torch.full(scales.shape, zero, dtype=torch.uint8)


def _q4_0(raw: Tensor) -> Parts:
    scales = _half(raw, 0)
    return _nibbles(raw[..., 2:]), scales, _constant(scales, 8)


def _q4_1(raw: Tensor) -> Parts:
    return _affine(_nibbles(raw[..., 4:]), _half(raw, 0), -_half(raw, 2))


def _q5_0(raw: Tensor) -> Parts:
    scales = _half(raw, 0)
    values = _nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6])
    return values, scales, _constant(scales, 16)


def _q5_1(raw: Tensor) -> Parts:
    values = _nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8])
    return _affine(values, _half(raw, 0), -_half(raw, 2))


def _q8_0(raw: Tensor) -> Parts:
    scales = _half(raw, 0)
    return raw[..., 2:] ^ 128, scales, _constant(scales, 128)  # int8 + 128, as uint8


def _q2_k(raw: Tensor) -> Parts:
    scales = _half(raw, 80) * (raw[..., :16] & 15).float()
    minima = _half(raw, 82) * (raw[..., :16] >> 4).float()
    return _affine(_crumbs(raw[..., 16:80]), scales, minima)


def _q3_k(raw: Tensor) -> Parts:
    import torch

    high = _bit_rows(raw[..., :32], 8).flatten(-2) << 2
    a, b, c = raw[..., 96:108].split(4, dim=-1)  # low 4 bits in a and b, high 2 bits in c
    low = (a & 15, b & 15, a >> 4, b >> 4)
    parts = [part | (((c >> (2 * i)) & 3) << 4) for i, part in enumerate(low)]
    scales = _half(raw, 108) * (torch.cat(parts, dim=-1).float() - 32)
    return _crumbs(raw[..., 32:96]) | high, scales, _constant(scales, 4)


def _iq4_nl(raw: Tensor) -> Parts:
    scales = _half(raw, 0)
    return _levels(_nibbles(raw[..., 2:])), scales, _constant(scales, 128)


def _iq4_xs(raw: Tensor) -> Parts:
    low = _nibbles(raw[..., 4:8].unsqueeze(-1)).flatten(-2)  # two scales in a byte
    high = _pairs(raw[..., 2:4])
    scales = _half(raw, 0) * ((low | (high << 4)).float() - 32)
    values = _nibbles(raw[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return _levels(values), scales, _constant(scales, 128)


def _levels(nibbles: Tensor) -> Tensor:
    """Return the 8-bit levels that the nibbles of the IQ4 types stand for, plus 128."""
    import torch

    table = torch.tensor([level + 128 for level in _IQ4_LEVELS], dtype=torch.uint8)
    return table[nibbles.int()]


def _pairs(raw: Tensor) -> Tensor:
    """Return [..., n] bytes as [..., 4 n] values of two bits, lowest first."""
    import torch

    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return ((raw.unsqueeze(-1) >> shifts) & 3).flatten(-2)


def _crumbs(raw: Tensor) -> Tensor:
    """Return 64 bytes as 256 values of two bits: of each 32 bytes, bits 0-1 of all, then 2-3, …"""
    import torch

    halves = raw.unflatten(-1, (2, 32))
    return torch.cat([(halves >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)


def _q4_k(raw: Tensor) -> Parts:
    scales, minima = _k_scales(raw)
    return _affine(_k_nibbles(raw[..., 16:]), scales, minima)


def _q5_k(raw: Tensor) -> Parts:
    scales, minima = _k_scales(raw)
    fifth = _bit_rows(raw[..., 16:48], 8).flatten(-2) << 4
    return _affine(_k_nibbles(raw[..., 48:]) | fifth, scales, minima)


def _q6_k(raw: Tensor) -> Parts:
    import torch

    low = raw[..., :128].unflatten(-1, (2, 64))
    low = torch.cat((low & 15, low >> 4), dim=-1)  # two halves of 128 values
    values = low.flatten(-2) | (_crumbs(raw[..., 128:192]) << 4)
    scales = _half(raw, 208) * raw[..., 192:208].contiguous().view(torch.int8).float()
    return values, scales, _constant(scales, 32)


def _k_nibbles(raw: Tensor) -> Tensor:
    """Return 128 bytes as 256 values: of each 32 bytes all low halves, then all high ones."""
    return _nibbles(raw.unflatten(-1, (4, 32))).flatten(-2)


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima [out, blocks, 8] of a K block: 6 bits each, in bytes 4 to 16.

    Bytes a (0-3) and b (4-7) hold scales and minima 0-3 in their low 6 bits; bytes c (8-11) hold
    the low 4 bits of scales and minima 4-7, whose high 2 bits are on top of a and b.
    """
    import torch

    a, b, c = raw[..., 4:16].split(4, dim=-1)
    scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=-1)
    minima = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=-1)
    return _half(raw, 0) * scales.float(), _half(raw, 2) * minima.float()


def _affine(values: Tensor, scales: Tensor, minima: Tensor) -> Parts:
    """Turn ``scale * value - minimum`` into ``scale * (value - zero)``, zero a float.

    A group of scale 0 is constant: it becomes value 0, zero 1, scale = minimum.
    """
    import torch

    is_flat = scales == 0
    safe = torch.where(is_flat, torch.ones_like(scales), scales)
    zeros = torch.where(is_flat, torch.ones_like(scales), minima / safe)
    scales = torch.where(is_flat, minima, scales)
    grouped = values.unflatten(-1, (scales.shape[-1], -1))
    values = torch.where(is_flat.unsqueeze(-1), torch.zeros_like(grouped), grouped).flatten(-2)
    return values, scales, zeros


_UNPACK: dict[str, tuple[int, Callable[[Tensor], Parts]]] = {
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q5_0": (6, _q5_0),
    "Q5_1": (6, _q5_1),
    "Q8_0": (8, _q8_0),
    "Q2_K": (4, _q2_k),
    "Q3_K": (4, _q3_k),
    "Q4_K": (4, _q4_k),
    "Q5_K": (6, _q5_k),
    "Q6_K": (6, _q6_k),
    "IQ4_NL": (8, _iq4_nl),
    "IQ4_XS": (8, _iq4_xs),
}
