"""Round trips of packed weights: error bounds for any values, order and padding of features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.kernels.native import formats, library, missing_reason
from mxn.kernels.native.pack import PackedWeight, glu_order, interleave, pack, pack_glu
from support.native import usable_variants

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

QUANTIZED = ["int8", *(f"int8-g{g}" for g in formats.GROUPS)]
QUANTIZED += [f"int4-g{g}{sym}" for g in formats.GROUPS for sym in ("", "-sym")]
QUANTIZED += [f"int6-g{g}" for g in formats.GROUPS]
HALF = 2.0**-11  # relative error of float16
KEPT = 0.6  # the least part of a range that 4 bits keep; refits cut a little more than 0.8


@pytest.fixture(autouse=True, scope="module")
def _restored():
    before = library().variant()
    yield
    library().use_variant(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_group(values_FD: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return float64 [F, G, columns], with zeros where a group has no column."""
    wide = torch.zeros(values_FD.shape[0], weight.in_padded, dtype=torch.float64)
    wide[:, : values_FD.shape[1]] = values_FD.double()
    return wide.view(len(wide), -1, weight.format.group or weight.in_padded)


def check_error(weight: PackedWeight, plain: torch.Tensor) -> None:
    """Fail where a value is further off than its format allows."""
    want = by_group(plain, weight)
    error = (by_group(weight.dequantize(), weight) - want).abs()
    low, high = want.amin(-1).clamp(max=0), want.amax(-1).clamp(min=0)
    most = torch.maximum(-low, high)
    if weight.format.bits == 8:
        step, lost = most / 127, 0.0
    elif weight.mins is None:
        # The largest becomes -8, so what is as large on the other side is cut at 7; more is cut
        # only where that makes the squares of all errors smaller.
        step, lost = most / 8, most * (1 - KEPT * 7 / 8)
    else:
        step, lost = (high - low) / 15, (high - low) * (1 - KEPT)
    bound = torch.maximum(step / 2, torch.as_tensor(lost)) + 2 * HALF * most + HALF * (high - low)
    least = 2.0**-24 * float(most.max()) * 2  # a scale this far below the largest one is lost
    assert (error <= bound[..., None] * (1 + 1e-5) + least + 1e-36).all()
    whole = (bound**2).amax() if weight.format.bits == 8 else (step / 2 + 2 * HALF * most) ** 2
    if weight.format.bits == 4:  # cutting never costs more than not cutting
        count = want.shape[-1]
        plain_cut = torch.where(want.sign() == -_larger(want)[..., None], error, 0).square().sum(-1)
        assert ((error**2).sum(-1) <= count * whole + plain_cut + least**2 * count + 1e-30).all()


def _larger(want: torch.Tensor) -> torch.Tensor:
    """Return the sign of each group's largest value."""
    at = want.abs().argmax(-1, keepdim=True)
    return want.gather(-1, at)[..., 0].sign()


SIZES = st.sampled_from([1e-20, 1e-6, 1.0, 300.0, 1e6, 1e15])


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(QUANTIZED), st.integers(1, 40), st.integers(1, 300), SIZES,
    st.integers(0, 2**31), st.sampled_from(["normal", "shifted", "heavy", "sparse", "steps"]),
    st.sampled_from(usable_variants() or ["none"]),
)  # fmt: skip
def test_no_value_is_further_off_than_its_format_allows(name, rows, columns, size, seed, kind, isa):
    library().use_variant(isa)
    w = normal(rows, columns, seed=seed)
    if kind == "shifted":
        w = w.abs() + 2
    elif kind == "heavy":
        w = w**3
    elif kind == "sparse":
        w = w * (w.abs() > 1.5)
    elif kind == "steps":
        w = w.round()
    w = w * size
    packed = pack(w, formats.parse_weights(name))
    assert packed.dequantize().shape == w.shape
    check_error(packed, w)


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_constant_and_single_values(name):
    wanted = formats.parse_weights(name)
    for value in (0.0, -0.0, 1.0, -1.0, 3e-30, 7e4, -1e15, 1e30, -1e37, 1e-40):
        w = torch.full((5, 40), value)
        got = pack(w, wanted).dequantize()
        assert got.isfinite().all()
        assert (got - w).abs().max() <= abs(value) * 2e-3 + 1e-36, value
        w = torch.zeros(20, 70)
        w[7, 33] = value
        got = pack(w, wanted).dequantize()
        assert abs(float(got[7, 33]) - value) <= abs(value) * 2e-3 + 1e-36, value
        got[7, 33] = 0
        # 15 steps and a minimum, each rounded to float16, need not meet at 0.
        nothing = 0.0 if wanted.is_symmetric else abs(value) * 1.1e-3
        assert (got.abs() <= nothing).all(), "something is made of zeros"


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_of_very_different_size_keep_their_own_precision(name):
    """Scales are float16 beside one common power of two: seven decades must fit."""
    wanted = formats.parse_weights(name)
    sizes = torch.logspace(-4, 2.5, 24)[:, None]
    w = normal(24, 128) * sizes
    off = (pack(w, wanted).dequantize() - w).norm(dim=1) / w.norm(dim=1)
    even = (pack(w / sizes, wanted).dequantize() - w / sizes).norm(dim=1) / (w / sizes).norm(dim=1)
    assert (off <= 1.05 * even + 2e-3).all(), (off / even).max()


@pytest.mark.parametrize("name", ["f32", "bf16", *QUANTIZED])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_fault_in_a_weight_is_not_made_finite(name, fault):
    w = normal(18, 70)
    w[3, 41] = fault
    got = pack(w, formats.parse_weights(name)).dequantize()
    assert not got[3, 41].isfinite()
    others = [row for row in range(18) if row != 3]
    assert got[others].isfinite().all()
    assert (got[others] - w[others]).abs().max() < 0.5


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "int6-g16", "int4-g16", "int4-g128-sym"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 40])
def test_glu_takes_turns_of_sixteen(name, width):
    gate_up, bias = normal(2 * width, 33), normal(2 * width, seed=1)
    wanted = formats.parse_weights(name)
    weight = pack_glu(gate_up, wanted, bias)
    blocks = -(-width // 16)
    assert weight.out_features == 32 * blocks
    got = weight.dequantize().view(blocks, 2, 16, 33)
    plain = pack(gate_up, wanted).dequantize()
    for i in range(2):
        half = got[:, i].reshape(-1, 33)
        assert torch.allclose(
            half[:width], plain[i * width : (i + 1) * width], rtol=2e-3, atol=1e-6
        )
        assert (half[width:] == 0).all()
        assert weight.bias is not None
        part = weight.bias.view(blocks, 2, 16)[:, i].reshape(-1)
        assert torch.equal(part[:width], bias[i * width : (i + 1) * width])
        assert (part[width:] == 0).all()
    order = glu_order(width)
    assert sorted(i for i in order.tolist() if i >= 0) == list(range(2 * width))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_interleaved_values_are_those_that_pack_writes(bits):
    """Importers lay values out in Python, `pack` does in C++: both must mean the same."""
    generator = torch.Generator().manual_seed(bits)
    high, middle = 2**bits, 2 ** (bits - 1)
    values = torch.randint(0, high, (32, 64), generator=generator, dtype=torch.uint8)
    values[:, 1::16] = high - 1  # the extremes fix scale and minimum
    if bits == 4:
        wanted = formats.WeightFormat(bits=4, group=16)
        values[:, ::16], values[:, 2::16] = 0, middle
    else:
        wanted = formats.WeightFormat(bits=bits, group=16, is_symmetric=True)
        values[:, ::16] = 1
        values = values.clamp(min=1)
    w = values.float() - middle
    packed = pack(w, wanted)
    assert torch.equal(packed.dequantize(), w)
    assert torch.equal(packed.data, interleave(values, bits))


def test_variants_pack_within_a_step_of_each_other():
    before, w = library().variant(), normal(40, 300)
    try:
        for name in QUANTIZED:
            found = []
            for isa in usable_variants():
                library().use_variant(isa)
                found.append(pack(w, formats.parse_weights(name)).dequantize())
            errors = [float((got - w).norm()) for got in found]
            assert max(errors) <= min(errors) * 1.001, name
    finally:
        library().use_variant(before)
