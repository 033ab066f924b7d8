"""Native kernels against the plain arithmetic they stand for, on every variant this processor runs.

Products are compared in float64 with `PackedWeight.dequantize()` and with the exact int8 rounding
of activations, so that tolerances are those of float32 sums and not those of quantization. Results
lie between guards. Attention is in `test_native_attention.py`.
"""

from __future__ import annotations

import math

import pytest
import torch

from mxn.kernels.native import formats, library, missing_reason
from mxn.kernels.native.pack import PackedWeight, pack, pack_glu
from mxn.kernels.ops.activation.naive import activation
from mxn.kernels.ops.rms_norm.naive import rms_norm
from mxn.kernels.ops.rope.naive import rope
from mxn.kernels.ops.softcap.naive import softcap
from support.native import Guarded, act_group, magnitude, quantized, read_rows, usable_variants

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

FORMATS = ["f32", "bf16", "int8", *(f"int8-g{g}" for g in formats.GROUPS)]
FORMATS += [f"int4-g{g}{sym}" for g in formats.GROUPS for sym in ("", "-sym")]
FORMATS += [f"int6-g{g}" for g in formats.GROUPS]
ROWS = [*range(14), 16, 17, 31, 64, 65, 129]
SHAPES = [(1, 1), (16, 128), (17, 13), (37, 131), (67, 257)]  # outputs, inputs
ULP = 2.0**-24
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@pytest.fixture(params=usable_variants() or ["none"])
def variant(request):
    """Use one variant during the test."""
    before = library().variant()
    library().use_variant(request.param)
    yield request.param
    library().use_variant(before)


@pytest.fixture(scope="module")
def threads():
    return library().Pool(2, 20)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(threads, weight: PackedWeight, x, *, before: float | None = None, group: int = 0):
    """Return a guarded y = x w^T, or y + before."""
    out = Guarded(len(x), weight.out_features, gap=5, fill=before)
    ld = x.stride(0) if len(x) else x.shape[1]
    library().linear(
        threads, weight.handle, x.data_ptr(), ld, len(x), out.address, out.ld, group,
        before is not None,
    )  # fmt: skip
    out.check()
    return out.value


def tolerance(weight: PackedWeight, seen_MK) -> torch.Tensor:
    """Return what float32 sums in any order may be off: [M, F]."""
    count = max(weight.in_features // act_group(weight), 1)
    if not weight.format.is_quantized:
        count = weight.in_features
    size = seen_MK.abs() @ magnitude(weight).T
    return ULP * (12 + 2 * count) * size + 1e-37


@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_float64_for_all_numbers_of_rows(variant, threads, name):
    wanted = formats.parse_weights(name)
    for i, (n, k) in enumerate(SHAPES):
        bias = normal(n, seed=i)
        plain = pack(normal(n, k, seed=i), wanted)
        biased = pack(normal(n, k, seed=i), wanted, bias)
        x = normal(max(ROWS), k, seed=9)
        seen = read_rows(plain, x)
        want, allowed = seen @ plain.dequantize().double().T, tolerance(plain, seen)
        for m in ROWS:
            got = product(threads, plain, x[:m]).double()
            assert ((got - want[:m]).abs() <= allowed[:m]).all(), (n, k, m)
        for m in (0, 1, 5, 9, 31):
            got = product(threads, biased, x[:m], before=0.75).double()
            rest = ULP * 4 * (want[:m].abs() + bias.abs() + 1)
            off = (got - want[:m] - bias.double() - 0.75).abs()
            assert (off <= allowed[:m] + rest).all(), (n, k, m)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int6", "int8-g64", "int4-g128-sym"])
def test_tiled_rows_give_the_same_bits(variant, threads, name):
    """From some number of rows on, activations lie tile by tile: only a matter of speed."""
    for n, k, rows in ((37, 131, (0, 1, 2, 7, 9, 24, 65)), (20, 8200, (97, 130))):
        weight = pack(normal(n, k), formats.parse_weights(name))
        x = normal(max(rows), k, seed=3)
        for m in rows:
            weight.handle.tiled_from = 1 << 30
            want = product(threads, weight, x[:m])
            weight.handle.tiled_from = 0
            assert torch.equal(product(threads, weight, x[:m]), want), (n, k, m)
            alone = library().Pool(1)
            assert torch.equal(product(alone, weight, x[:m]), want), "other threads, other bits"


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int6-g16", "int8-g64"])
def test_rows_may_lie_apart_in_memory(variant, threads, name):
    weight = pack(normal(33, 100), formats.parse_weights(name))
    wide = torch.full((7, 131), math.nan)
    wide[:, :100] = normal(7, 100, seed=1)
    assert torch.equal(
        product(threads, weight, wide[:, :100]),
        product(threads, weight, wide[:, :100].contiguous()),
    )


@pytest.mark.parametrize("group", [16, 32, 48, 96, 4])
def test_activations_may_have_scales_for_groups_where_weights_have_one(variant, threads, group):
    weight = pack(normal(35, 90), formats.INT8)
    x = normal(9, 90, seed=2) * torch.logspace(-3, 3, 90)
    q, scales = quantized(x, weight.in_padded, group)
    seen = (q.double().view(9, -1, group) * scales.double()[..., None]).view(9, -1)[:, :90]
    want = seen @ weight.dequantize().double().T
    got = product(threads, weight, x, group=group).double()
    assert ((got - want).abs() <= 8 * tolerance(weight, seen)).all()


@pytest.mark.parametrize("name", ["int8", "int8-g32", "int6-g32", "int4-g64", "int4-g16-sym"])
def test_quantization_of_activations_costs_at_most_half_a_step(variant, threads, name):
    weight = pack(normal(40, 200), formats.parse_weights(name))
    x = normal(6, 200, seed=3)
    x[3, 17] = 900.0  # the outlier makes the step of its group large, and of no other
    seen = read_rows(weight, x)
    step = act_group(weight)
    _, scales = quantized(x, weight.in_padded, step)
    halves = (scales.double() / 2).repeat_interleave(step, 1)[:, :200]
    assert ((seen - x.double()).abs() <= halves * (1 + 1e-5)).all()
    bound = halves @ weight.dequantize().double().abs().T
    want = x.double() @ weight.dequantize().double().T
    got = product(threads, weight, x).double()
    assert ((got - want).abs() <= bound + tolerance(weight, seen)).all()


SPECIAL = {
    "zero": 0.0, "negative zero": -0.0, "tiny": 1e-30, "denormal": 1e-39, "least": 1e-45,
    "huge": 1e30,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["f32", "bf16", "int8", "int8-g16", "int6-g32", "int4-g32", "int4-g64-sym"]
)
def test_extreme_rows_give_their_own_result_and_leave_the_others_alone(variant, threads, name):
    weight = pack(normal(21, 77), formats.parse_weights(name), normal(21, seed=8))
    x = normal(len(SPECIAL) + 3, 77, seed=4)
    for row, size in enumerate(SPECIAL.values()):
        x[row] = x[row] * size
    x[-3] = 1e-3
    x[-3, 40] = 1e4
    seen = read_rows(weight, x)
    want = seen @ weight.dequantize().double().T + weight.bias[:21].double()
    got = product(threads, weight, x).double()
    assert got.isfinite().all()
    off = (got - want).abs()
    assert (off <= tolerance(weight, seen) + ULP * 4 * (want.abs() + 4)).all()
    alone = torch.cat([product(threads, weight, row[None]) for row in x])
    assert torch.allclose(got.float(), alone, rtol=1e-4, atol=1e-4 * 21)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["f32", "bf16", "int8", "int8-g16", "int6-g32", "int4-g32", "int4-g64-sym"]
)
def test_a_fault_stays_in_its_row_and_is_never_made_finite(variant, threads, name, fault):
    weight = pack(normal(21, 77) + 0.01, formats.parse_weights(name), normal(21, seed=8))
    x = normal(11, 77, seed=5)
    clean = product(threads, weight, x)
    for column in (0, 15, 16, 40, 76):
        faulty = x.clone()
        faulty[4, column] = fault
        got = product(threads, weight, faulty)
        assert not got[4].isfinite().any(), column
        others = [m for m in range(11) if m != 4]
        assert torch.equal(got[others], clean[others]), column


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(
    "name", ["f32", "bf16", "int8", "int6-g16", "int4-g32", "int4-g64-sym", "int8-g16"]
)
def test_glu_products_equal_their_parts(variant, threads, name, kind):
    for width, k in ((1, 5), (16, 32), (37, 67), (50, 130)):
        gate_up, bias = normal(2 * width, k), normal(2 * width, seed=1)
        weight = pack_glu(gate_up, formats.parse_weights(name), bias)
        blocks = weight.dequantize().double().view(-1, 2, 16, k)
        gate, up = (blocks[:, i].reshape(-1, k)[:width] for i in (0, 1))
        for m in (0, 1, 2, 3, 7, 13, 33):
            x = normal(m, k, seed=6)
            seen = read_rows(weight, x) if m else x.double()
            g = seen @ gate.T + bias[:width].double()
            u = seen @ up.T + bias[width:].double()
            want = act64(g, kind) * u
            out = Guarded(m, width)
            library().linear_glu(
                threads, weight.handle, x.data_ptr(), k, m, out.address, width, 0,
                getattr(library().Act, kind),
            )  # fmt: skip
            out.check()
            assert torch.allclose(out.value.double(), want, rtol=2e-5, atol=2e-5 * k), (width, m)


def act64(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return an activation in float64."""
    if kind == "relu":
        return x.relu()
    if kind == "silu":
        return torch.nn.functional.silu(x)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


@pytest.mark.parametrize("n", [1, 4, 15, 16, 17, 33, 80, 127])
def test_rms_norm_equals_the_naive_one(variant, n):
    x, w = normal(3, n) * torch.tensor([[1.0], [1e-12], [1e12]]), normal(n, seed=1)
    out = Guarded(3, n)
    library().rms_norm(x.data_ptr(), w.data_ptr(), out.address, 3, n, 1e-6)
    out.check()
    assert torch.allclose(out.value, rms_norm(x, w, 1e-6), rtol=1e-5, atol=1e-30)
    library().rms_norm(x.data_ptr(), w.data_ptr(), x.data_ptr(), 3, n, 1e-6)  # in place
    assert torch.equal(x, out.value)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_equal_the_naive_ones_over_the_whole_range(variant, kind):
    sizes = torch.logspace(-40, 38, 300, dtype=torch.float64).float()
    x = torch.cat((torch.linspace(-100, 100, 801), sizes, -sizes, torch.tensor([0.0, -0.0])))
    out = Guarded(1, len(x))
    library().activate(x.data_ptr(), out.address, len(x), getattr(library().Act, kind))
    out.check()
    got, want = out.value[0].double(), act64(x.double(), kind)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), (got - want).abs().max()
    assert torch.allclose(out.value[0], activation(x, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_keep_nan_and_inf(variant, kind):
    x = normal(37)
    x[5], x[6], x[33] = math.nan, math.inf, math.nan
    out = Guarded(1, 37)
    library().activate(x.data_ptr(), out.address, 37, getattr(library().Act, kind))
    got = out.value[0]
    assert not got[[5, 6, 33]].isfinite().any()
    assert got.isfinite().sum() == 34


@pytest.mark.parametrize("n", [1, 16, 19, 50])
def test_softcap_equals_the_naive_one_and_keeps_nan(variant, n):
    x = normal(n) * torch.logspace(-6, 6, n)
    for cap in (0.5, 30.0, 50.0):
        out = Guarded(1, n, fill=0.0)
        out.value[0] = x
        library().softcap(out.address, n, cap)
        out.check()
        assert torch.allclose(out.value[0], softcap(x, cap), rtol=2e-6, atol=2e-7 * cap)
    out.value[0, n // 2] = math.nan
    library().softcap(out.address, n, 30.0)
    assert out.value[0].isnan().nonzero().flatten().tolist() == [n // 2]


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "half"), [(4, 2), (20, 10), (64, 32), (80, 16), (128, 64), (34, 17)]
)
def test_rope_equals_the_naive_one_and_leaves_the_rest(variant, dim, half, is_interleaved):
    x, angles = normal(1, 1, dim), normal(1, half, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = Guarded(1, dim, fill=0.0)
    out.value[0] = x[0, 0]
    library().rope(out.address, cos.data_ptr(), sin.data_ptr(), half, is_interleaved)
    out.check()
    want, _ = rope(x, x, cos, sin, is_interleaved)
    assert torch.allclose(out.value[0], want[0, 0], atol=1e-6)
    assert torch.equal(out.value[0, 2 * half :], x[0, 0, 2 * half :])


@pytest.mark.parametrize(
    ("group", "padded"), [(16, 144), (32, 160), (48, 144), (64, 192), (144, 144)]
)
def test_quantize_rounds_to_nearest_and_pads_with_zeros(variant, group, padded):
    k = 130
    x = normal(5, k) * 3
    x[1, :40] = 0
    x[2] *= 1e-30
    x[3, 5] = -1e5
    q, scales = quantized(x, padded, group)
    wide = torch.zeros(5, padded, dtype=torch.float64)
    wide[:, :k] = x.double()
    grouped = wide.view(5, -1, group)
    most = grouped.abs().amax(-1)
    assert torch.allclose(scales.double(), most / 127, rtol=1e-6)
    assert (q.long().abs() <= 127).all()
    assert (q[:, k:] == 0).all()
    steps = torch.where(most[..., None] > 0, grouped / (most / 127)[..., None], 0.0)
    assert ((q.view(5, -1, group) - steps).abs() <= 0.5 + 1e-4).all()


def test_quantize_makes_a_fault_visible_and_no_larger(variant):
    for fault in (math.nan, math.inf, -math.inf):
        for at in (0, 15, 16, 31, 40):
            x = normal(1, 47)
            x[0, at] = fault
            q, scales = quantized(x, 48, 16)
            assert scales[0].isfinite().tolist() == [g != at // 16 for g in range(3)]
            assert (q.view(3, 16)[at // 16] == 0).all(), "values beside a fault mean nothing"


@pytest.mark.parametrize("name", FORMATS)
def test_variants_agree_with_each_other(threads, name):
    wanted = formats.parse_weights(name)
    before = library().variant()
    weight, x = pack(normal(53, 211), wanted, normal(53, seed=1)), normal(19, 211, seed=2)
    found, rows = {}, {}
    try:
        for name_of in usable_variants():
            library().use_variant(name_of)
            found[name_of] = product(threads, weight, x)
            if wanted.is_quantized:
                rows[name_of] = quantized(x, weight.in_padded, act_group(weight))[0]
    finally:
        library().use_variant(before)
    allowed = 2 * tolerance(weight, x.double()) + 1e-5
    for name_of, got in found.items():
        assert ((got - found["generic"]).abs() <= allowed).all(), name_of
        if rows:
            assert torch.equal(rows[name_of], rows["generic"])


@pytest.mark.parametrize("k", [16, 40, 300, 1030])
def test_dot_products_of_integers_are_exact_on_every_variant(variant, threads, k):
    """Weights and activations are whole numbers with scale 1, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(k)
    w = torch.randint(-127, 128, (18, k), generator=generator).float()
    x = torch.randint(-127, 128, (9, k), generator=generator).float()
    w[:, 0] = x[:, 0] = 127
    w[3], x[2] = 127, 127  # the largest sums: pairs of full bytes would leave int16
    w[4] = -127
    w[4, 0] = 127
    got = product(threads, pack(w, formats.INT8), x)
    assert torch.equal(got.double(), (x.double() @ w.double().T).float().double())
