"""Every block type of GGUF through the native integer kernels, on every usable variant.

The blocks are those that PyPI's `gguf` wrote and read back: `test_quantized_readers.py` says that
the numbers are right, this that kernels multiply by them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mxn.kernels.native import library, missing_reason
from mxn.kernels.native.pack import glu_order
from mxn.models.native.stored import can_pack, pack_stored
from mxn.models.quantized.gguf_blocks import _UNPACK, to_matrix
from mxn.models.quantized.gguf_file import TYPES
from mxn.models.quantized.matrix import QuantizedMatrix
from support.native import Guarded, magnitude, read_rows, usable_variants

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

BLOCKS = load_file(Path(__file__).parent / "golden" / "quantized" / "gguf_blocks.safetensors")
HALF = 2.0**-11  # scales and minima are kept as float16
ROWS = (1, 2, 5, 16, 33)


@pytest.fixture(params=usable_variants() or ["none"])
def variant(request):
    before = library().variant()
    library().use_variant(request.param)
    yield request.param
    library().use_variant(before)


def golden(kind: str) -> QuantizedMatrix:
    raw = BLOCKS[f"{kind}.raw"]
    size = next(block for block in TYPES.values() if block.name == kind).num_bytes
    return to_matrix(kind, raw.view(raw.shape[0], -1, size))


def kept_error(matrix: QuantizedMatrix) -> torch.Tensor:
    """Return [F, 1]: what float16 scales and minima may cost a number of each row."""
    scales, zeros = matrix.scales.double().abs(), matrix.zeros.double()
    most = scales * torch.maximum(zeros.abs(), (2**matrix.bits - zeros).abs())
    return 3 * HALF * most.amax(1, keepdim=True) + HALF * 2.0**-13 * float(scales.max())


def test_no_block_type_is_forgotten():
    assert {name.split(".")[0] for name in BLOCKS} == set(_UNPACK)


@pytest.mark.parametrize("kind", sorted(_UNPACK))
def test_packed_blocks_are_the_makers_numbers_up_to_half_a_unit_of_their_scales(kind):
    matrix = golden(kind)
    assert can_pack(matrix)
    want, weight = matrix.dequantize(), pack_stored(matrix)
    assert weight.format.bits == matrix.bits
    assert ((weight.dequantize().double() - want.double()).abs() <= kept_error(matrix)).all()
    assert (weight.dequantize() - want).norm() < HALF * 2 * want.norm()


@pytest.mark.parametrize("kind", sorted(_UNPACK))
def test_products_with_every_block_type_equal_float64(variant, kind):
    matrix, count = golden(kind), 38  # no whole number of blocks of 16, no two rows alike
    matrix = matrix.rows(torch.arange(count) % matrix.shape[0])
    matrix = replace(matrix, scales=matrix.scales * torch.linspace(0.5, 2, count)[:, None])
    bias = torch.zeros(-(-count // 16) * 16)
    bias[:count] = torch.linspace(-1, 1, count)
    x = torch.randn(max(ROWS), matrix.shape[1], generator=torch.Generator().manual_seed(3))
    for order in (None, glu_order(count // 2)):
        weight = pack_stored(matrix, bias if order is None else None, order)
        seen, plain = read_rows(weight, x), weight.dequantize().double()
        want = seen @ plain.T + (bias[:count].double() if order is None else 0)
        groups = matrix.shape[1] // matrix.group
        allowed = 2.0**-24 * (16 + 2 * groups) * (seen.abs() @ magnitude(weight).T + 1)
        for m in ROWS:
            out = Guarded(m, weight.out_features, gap=5)
            library().linear(
                library().Pool(1), weight.handle, x.data_ptr(), x.stride(0), m, out.address,
                out.ld, 0, False,
            )  # fmt: skip
            out.check()
            assert ((out.value.double() - want[:m]).abs() <= allowed[:m]).all(), (m, order is None)
    # Against the maker's numbers and unrounded activations: 8 bits cost about half a percent.
    exact = x.double() @ matrix.dequantize().double().T
    got = read_rows(pack_stored(matrix), x) @ pack_stored(matrix).dequantize().double().T
    error = float((got - exact).norm() / exact.norm())
    assert math.isfinite(error)
    assert error < 0.02
