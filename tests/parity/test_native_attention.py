"""Native attention and cache against a float64 softmax over what the cache holds.

The cache is read back from its bytes in Python, so that a wrong layout shows as a wrong key and not
only as a wrong sum. Slots that nobody wrote are NaN all the time.
"""

from __future__ import annotations

import math

import pytest
import torch

from mxn.kernels.native import library, missing_reason
from support.native import PagedCache, attend, quantized, usable_variants

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

KINDS = ("f32", "bf16", "i8")
DIMS = (4, 8, 16, 20, 64, 80, 96, 128, 256)


@pytest.fixture(params=usable_variants() or ["none"])
def variant(request):
    """Use one variant during the test."""
    before = library().variant()
    library().use_variant(request.param)
    yield request.param
    library().use_variant(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(
    kind: str, tokens: int, k_dim: int, v_dim: int, *, size: float = 1.0, **more
) -> PagedCache:
    """Return a cache in which both heads hold `tokens` tokens, and every other slot NaN."""
    cache = PagedCache(kind, 2, k_dim, v_dim, **more)
    keys, values = normal(tokens, 2, k_dim, seed=1) * size, normal(tokens, 2, max(v_dim, 1), seed=2)
    for token in range(tokens):
        for head in range(2):
            v = values[token, head] if v_dim else None
            cache.write(token, head, keys[token, head], v)
    cache.check()
    return cache


def expected(cache, head, q_RH, limits, *, begin=0, end=None, window=0, scale=1.0, softcap=0.0):
    """Return the scores and the result of a plain softmax, float64 [R, tokens] and [R, J].

    The third result bounds what rounding the weights of 64 tokens to 14 bits can change: [R, 1].
    """
    end = max(limits) if end is None else end
    pairs = [cache.read(token, head) for token in range(begin, end)]
    k_CH, v_CJ = torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])
    seen = q_RH.double()
    if cache.kind == "i8":
        q, scales = quantized(q_RH, q_RH.shape[1], q_RH.shape[1])
        seen = q.double() * scales.double()
    scores = seen @ k_CH.T * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    token, limit = torch.arange(begin, end), torch.tensor(limits)[:, None]
    hidden = (token >= limit) | ((token < limit - window) if window else (token < 0))
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1)
    rounding = torch.zeros(len(weights), 1, dtype=torch.float64)
    if cache.kind == "i8":
        for start in range(0, end - begin, 64):
            part = weights[:, start : start + 64]
            v_scales = torch.tensor(
                [cache.value_scale(begin + start + t, head) for t in range(part.shape[1])]
            )
            whole = v_CJ[start : start + 64] / v_scales[:, None].clamp(min=1e-30)
            step = (part * v_scales).amax(1, keepdim=True) / (127 * 128 + 127)
            rounding += 0.5 * step * float(whole.abs().sum(0).max())
    return scores, weights @ v_CJ, rounding


def compare(cache, head, q_RH, limits, **options) -> None:
    out, den, _, _ = attend(cache, head, q_RH, limits, **options)
    options = {k: v for k, v in options.items() if k not in ("phi", "margin")}
    scores, want, rounding = expected(cache, head, q_RH, limits, **options)
    got = out.double() / den.double()[:, None]
    top = scores[scores.isfinite()].abs().max()
    allowed = 3e-6 * (1 + float(top)) * 4
    assert ((got - want).abs() <= allowed + rounding).all(), (limits, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_written_keys_and_values_read_back_exactly_rounded(variant, kind, dim):
    cache = PagedCache(kind, 3, dim, dim + 4, page_tokens=32, num_pages=3)
    tokens = [0, 15, 16, 31, 32, 70]
    k, v = normal(len(tokens), 3, dim), normal(len(tokens), 3, dim + 4, seed=1)
    k[1], v[2] = 0.0, 0.0
    k[3, 0, 2] = 1e4
    for i, token in enumerate(tokens):
        for head in range(3):
            cache.write(token, head, k[i, head], v[i, head])
    cache.check()
    for i, token in enumerate(tokens):
        for head in range(3):
            for got, given in zip(cache.read(token, head), (k[i, head], v[i, head]), strict=True):
                assert torch.equal(got.float(), rounded(given, kind).float())
    assert cache.read(1, 0)[0].isnan().all() or kind == "i8", "a neighbour was written"


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "i8":
        q, scales = quantized(x[None], len(x), len(x))
        return (q.double() * scales.double())[0]
    return (x if kind == "f32" else x.bfloat16()).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_attention_equals_a_float64_softmax(variant, kind, dim):
    cache = filled(kind, 90, dim, dim)
    for rows in (1, 2, 3, 5, 7, 8, 13, 16):
        limits = [90 - 7 * (r % 3) for r in range(rows)]
        compare(cache, rows % 2, normal(rows, dim, seed=3), limits, scale=dim**-0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_limits_at_the_edges_of_blocks_pages_and_chunks(variant, kind):
    for page_tokens in (16, 32, 48):
        cache = filled(kind, 143, 20, 24, page_tokens=page_tokens, num_pages=9)
        for limit in (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 143):
            compare(cache, 1, normal(2, 20, seed=limit), [limit, max(1, limit - 1)], scale=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 64, 100, 1000])
def test_windows_hide_all_that_is_older(variant, kind, window):
    cache = filled(kind, 100, 32, 16)
    for last in (1, 17, 64, 81, 100):
        limits = [max(1, last - r) for r in range(5)]
        begin = max(0, min(limits) - window) // 16 * 16
        compare(cache, 0, normal(5, 32, seed=4), limits, window=window, begin=begin, scale=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_is_applied_before_hiding(variant, kind, softcap):
    cache = filled(kind, 70, 64, 64, size=3.0)
    compare(cache, 1, normal(6, 64, seed=5), [70, 3, 64, 65, 16, 1], softcap=softcap, window=30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("latent", "rope_dim"), [(4, 4), (16, 8), (36, 12), (64, 16), (512, 64)])
def test_latent_attention_takes_values_from_keys(variant, kind, latent, rope_dim):
    cache = filled(kind, 75, latent + rope_dim, 0, latent=latent)
    for rows in (1, 4, 9, 16):
        limits = [75 - 5 * (r % 4) for r in range(rows)]
        q = normal(rows, latent + rope_dim, seed=6)
        compare(cache, 1, q, limits, scale=(latent + rope_dim) ** -0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_join_to_the_whole(variant, kind):
    """What a decoder does with one long context: exact whatever each range subtracted."""
    cache = filled(kind, 120, 32, 32, size=2.0)
    q, limits = normal(4, 32, seed=7), [120, 119, 100, 60]
    _, want, rounding = expected(cache, 0, q, limits)
    for margin in (0.0, 50.0):
        parts = [attend(cache, 0, q, limits, begin=b, end=e, margin=margin, phi=1.0)
                 for b, e in ((0, 48), (48, 64), (64, 112), (112, 120))]  # fmt: skip
        top = torch.stack([ref for _, _, ref, _ in parts]).amax(0)
        sums, den = 0.0, 0.0
        for out, part_den, ref, _ in parts:
            factor = (ref - top).double().exp()
            sums, den = sums + out.double() * factor[:, None], den + part_den.double() * factor
        assert ((sums / den[:, None] - want).abs() <= 1e-4 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_sees_nothing_of_a_range_adds_nothing(variant, kind):
    cache = filled(kind, 64, 16, 16)
    for margin in (0.0, 5.0):
        out, den, _, flags = attend(
            cache, 0, normal(2, 16), [64, 20], begin=32, end=64, margin=margin, phi=-3.0, scale=0.1
        )
        assert den[1] == 0
        assert (out[1] == 0).all()
        assert flags[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_unified_maximum_equals_the_running_one_inside_its_margin(variant, kind):
    cache = filled(kind, 100, 64, 64)
    q, limits = normal(8, 64, seed=8), [100 - r for r in range(8)]
    scores, want, rounding = expected(cache, 0, q, limits, scale=0.125)
    top = scores.amax(-1)
    for phi in (0.0, 3.0, -2.0):
        margin = float((top - phi).abs().max()) + 0.1
        out, den, ref, flags = attend(cache, 0, q, limits, scale=0.125, phi=phi, margin=margin)
        assert flags.sum() == 0
        assert (ref == phi).all()
        got = out.double() / den.double()[:, None]
        assert ((got - want).abs() <= 1e-5 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_beyond_the_margin_is_flagged_and_no_other(variant, kind):
    cache = filled(kind, 80, 32, 32)
    q = normal(6, 32, seed=9)
    scores, _, _ = expected(cache, 0, q, [80] * 6)
    q = q * (4.0 / scores.amax(-1, keepdim=True)).float()  # now every maximum is about 4
    q[1] *= 10  # about 40: beyond the upper end
    q[4] *= 0.01  # about 0.04: below the lower end
    q[5] *= 100  # about 400: exp overflows
    _, _, _, flags = attend(cache, 0, q, [80] * 6, phi=5.0, margin=3.0)
    assert flags.tolist() == [0, 1, 0, 0, 1, 1]
    out, den, _, flags = attend(cache, 0, q, [80] * 6)
    assert flags.sum() == 0
    _, want, rounding = expected(cache, 0, q, [80] * 6)
    got = out.double() / den.double()[:, None]
    assert ((got - want).abs() <= 2e-4 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("margin", [0.0, 60.0])
def test_a_fault_in_a_query_stays_in_its_row(variant, kind, fault, softcap, margin):
    cache = filled(kind, 70, 36, 20)
    q, options = normal(9, 36), {"softcap": softcap, "margin": margin, "scale": 0.2}
    clean = attend(cache, 0, q, [70] * 9, **options)
    for at in (0, 17, 35):
        faulty = q.clone()
        faulty[3, at] = fault
        out, den, _, _ = attend(cache, 0, faulty, [70] * 9, **options)
        if fault != fault or not softcap:  # a softcapped infinity is a number
            assert not (out[3] / den[3]).isfinite().any()
        others = [r for r in range(9) if r != 3]
        assert torch.equal(out[others], clean[0][others])
        assert torch.equal(den[others], clean[1][others])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_a_latent_reaches_all_who_see_it_and_no_other(variant, kind):
    cache = filled(kind, 40, 36, 0, latent=20)
    k = normal(36)
    k[5] = math.nan
    cache.write(37, 0, k, None)
    out, den, _, _ = attend(cache, 0, normal(4, 36), [40, 37, 20, 38])
    is_nan = (out / den[:, None]).isnan().any(1)
    assert is_nan.tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_fault_in_the_cache_reaches_all_who_see_it(variant, kind, part):
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):  # NaN of different payloads
        cache = filled(kind, 40, 16, 16)
        nan = torch.full((1,), bits, dtype=torch.int32).view(torch.float32)
        k, v = normal(16), normal(16, seed=1)
        (k if part == "key" else v)[5] = nan
        cache.write(37, 0, k, v)
        out, den, _, _ = attend(cache, 0, normal(3, 16), [40, 38, 40])
        assert (out / den[:, None])[:, 5].isnan().all()
        out, den, _, _ = attend(cache, 0, normal(2, 16), [37, 20])
        assert (out / den[:, None]).isfinite().all()
        out, den, _, _ = attend(cache, 0, normal(3, 16), [40, 37, 20])
        assert (out / den[:, None])[1:].isfinite().all(), "it reached a row that must not see it"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.0, 60.0])
def test_a_fault_in_a_value_does_not_reach_rows_of_the_call_that_end_before_it(
    variant, kind, margin
):
    """Rows of a prompt share a call; what a later token broke is not an earlier one's."""
    cache = filled(kind, 40, 16, 16)
    v = normal(16, seed=1)
    v[5] = math.nan
    cache.write(37, 0, normal(16), v)
    out, den, _, _ = attend(cache, 0, normal(4, 16), [36, 37, 38, 40], margin=margin, scale=0.2)
    result = out / den[:, None]
    assert result[2:, 5].isnan().all()
    assert result[:2].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.0, 60.0])
def test_a_fault_in_a_key_does_not_reach_rows_of_the_call_that_end_before_it(variant, kind, margin):
    cache = filled(kind, 40, 16, 16)
    k = normal(16)
    k[5] = math.nan
    cache.write(37, 0, k, normal(16, seed=1))
    out, den, _, _ = attend(cache, 0, normal(4, 16), [36, 37, 38, 40], margin=margin, scale=0.2)
    result = out / den[:, None]
    assert result[2:].isnan().all()
    assert result[:2].isfinite().all()


def test_variants_agree_with_each_other():
    before, found = library().variant(), {}
    try:
        for name in usable_variants():
            library().use_variant(name)
            for kind in KINDS:
                cache = filled(kind, 77, 80, 48)
                out, den, _, _ = attend(cache, 0, normal(11, 80), [77 - r for r in range(11)])
                found[name, kind] = cache.memory, out / den[:, None]
    finally:
        library().use_variant(before)
    for (name, kind), (memory, result) in found.items():
        other_memory, other = found["generic", kind]
        assert torch.equal(memory, other_memory), (name, kind)
        assert torch.allclose(result, other, atol=1e-4), (name, kind)
