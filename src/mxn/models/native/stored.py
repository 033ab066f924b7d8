"""Weights that their maker quantized, packed as they are: no second rounding.

Knows the neutral form of quantized checkpoints and the layout of the kernels. Start at
`pack_stored`; `can_pack` says which matrices fit. `pack_mixed` joins them with rounded ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mxn.kernels.native.formats import GROUPS, WeightFormat
from mxn.kernels.native.pack import (
    LANES,
    PackedWeight,
    assemble,
    interleave,
    pack,
    padded_width,
    stack,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mxn.models.quantized.matrix import QuantizedMatrix


def can_pack(matrix: QuantizedMatrix) -> bool:
    """Whether the kernels can read these numbers: plain column order, and a group they know.

    8-bit rows with one scale and a zero point other than 128 need a minimum for each row; the
    kernels have that too.
    """
    is_whole_row = matrix.group == matrix.shape[1]
    return matrix.perm is None and (matrix.group in GROUPS or is_whole_row)


def pack_stored(
    matrix: QuantizedMatrix, bias: Tensor | None = None, order: Tensor | None = None
) -> PackedWeight:
    """Return `matrix` as native kernels read it; `order` [F in 16s] says which row stands where.

    An index of -1 in `order` is a row of zeros; without one the rows keep their order. `bias`
    float32 is in the packed order, padded to whole blocks.
    """
    out_features, in_features = matrix.shape
    blocks = -(-out_features // LANES)
    if order is None:
        order = torch.full((blocks * LANES,), -1, dtype=torch.int64)
        order[:out_features] = torch.arange(out_features)
    else:
        out_features = len(order)
    middle = 1 << (matrix.bits - 1)
    is_symmetric = bool((matrix.zeros == middle).all())
    group = 0 if matrix.group == in_features else matrix.group
    wanted = WeightFormat(bits=matrix.bits, group=group, is_symmetric=is_symmetric)
    width = padded_width(in_features, wanted)
    values = torch.full((len(order), width), middle, dtype=torch.uint8)
    at = order.clamp(min=0)
    values[:, :in_features] = matrix.values[at]
    values[order < 0] = middle
    scales = _by_block(matrix.scales.float(), order)
    mins = None if is_symmetric else _by_block(matrix.scales * matrix.zeros.float(), order)
    data = interleave(values, matrix.bits)
    return assemble(wanted, out_features, in_features, data, scales, mins, bias)


def can_pack_mixed(parts: Sequence[QuantizedMatrix], bits: int) -> bool:
    """Whether `pack_mixed` can join `parts`: some have no more than `bits`, others more."""
    kept = [part for part in parts if part.bits <= bits]
    if not 0 < len(kept) < len(parts) or not all(can_pack(part) for part in kept):
        return False
    if any(part.shape[0] % LANES or part.shape[1] != kept[0].shape[1] for part in parts):
        return False
    return math.gcd(*(part.group for part in kept)) in GROUPS


def pack_mixed(
    parts: Sequence[QuantizedMatrix], bits: int, bias: Tensor | None = None
) -> PackedWeight:
    """Join `parts` on the output dim: those of at most `bits` as they are, the others rounded.

    All get the smallest group of those that are kept. A Q4_K_M file has q and k in 4 bits and v in
    6: with 4 wanted, v alone is rounded. See `can_pack_mixed`.
    """
    kept = [part for part in parts if part.bits <= bits]
    most, group = max(part.bits for part in kept), math.gcd(*(part.group for part in kept))
    rounded = WeightFormat(bits=most, group=group, is_symmetric=most != 4)
    packed = [
        pack_stored(replace(part.regrouped(group), bits=most))
        if part.bits <= bits
        else pack(part.dequantize(), rounded)
        for part in parts
    ]
    return stack(packed, bias)


def _by_block(numbers_FG: Tensor, order: Tensor) -> Tensor:
    """Return [F / 16, G, 16] of rows in `order`, zeros for padding."""
    rows = numbers_FG[order.clamp(min=0)]
    rows[order < 0] = 0
    return rows.view(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()
