"""The bytes of packed weights. Artifacts hold them: who changes them counts `LAYOUT` up.

After such a change put the new hashes here, in the commit that makes LAYOUT one more.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from mxn.kernels.native import formats, missing_reason
from mxn.kernels.native.pack import glu_order, pack
from mxn.models.native.artifact import LAYOUT
from mxn.models.native.stored import pack_stored
from mxn.models.quantized.matrix import QuantizedMatrix

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

ROWS, COLUMNS = 40, 192
_OF_LAYOUT_2 = {
    "int4-g32-sym": "1c7fb9c576ff958c",
    "int4-g64": "44ba1cfeda5ef183",
    "int6-g64": "fe2b017f367c5848",
    "int8": "607c90e31fcd5ed1",
    "int8-g16": "1f0ada82d74abb09",
    "int8-g64 with a minimum": "ae02caf45ec7534e",
    "int4-g64, gate and up": "daacd3c84f8c11f9",
    "bf16": "25ee4e6d2b5c6e8c",
    "f32": "7799fe3424e252a1",
}


def numbers(rows: int, columns: int, below: int) -> torch.Tensor:
    """Return whole numbers [rows, columns] from a rule of ours, the same on any machine."""
    return (torch.arange(rows * columns) * 7919 % 10007 % below).view(rows, columns)


def digest(weight) -> str:
    found = hashlib.sha256(f"{weight.gain} {weight.out_features} {weight.in_padded}".encode())
    for part in (weight.data, weight.scales, weight.mins):
        if part is not None:
            found.update(part.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def quantized(bits: int, group: int, is_symmetric: bool, order=None) -> str:
    groups = COLUMNS // group
    zeros = torch.full((ROWS, groups), 1 << (bits - 1))
    matrix = QuantizedMatrix(
        values=numbers(ROWS, COLUMNS, 1 << bits).to(torch.uint8),
        scales=(numbers(ROWS, groups, 61) + 1).float() / 64,
        zeros=zeros if is_symmetric else numbers(ROWS, groups, 1 << bits),
        bits=bits, group=group,
    )  # fmt: skip
    return digest(pack_stored(matrix, order=order))


def plain(wanted: formats.WeightFormat) -> str:
    return digest(pack(numbers(ROWS, COLUMNS, 256).float() - 128, wanted))


def test_packed_bytes_are_those_of_this_layout():
    found = {
        "int4-g32-sym": quantized(4, 32, True),
        "int4-g64": quantized(4, 64, False),
        "int6-g64": quantized(6, 64, True),
        "int8": quantized(8, COLUMNS, True),
        "int8-g16": quantized(8, 16, True),
        "int8-g64 with a minimum": quantized(8, 64, False),
        "int4-g64, gate and up": quantized(4, 64, False, glu_order(ROWS // 2)),
        "bf16": plain(formats.BF16),
        "f32": plain(formats.F32),
    }
    assert found == _OF_LAYOUT_2
    assert LAYOUT == 2
