"""The Triton kernels against `naive.py`, in Triton's interpreter; needs triton, but no GPU.

Memory that a kernel is given to write in is NaN before (`torch.empty` is filled), so what it leaves
out shows. What the interpreter cannot say (machine code) is in test_triton_compiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxn.kernels import parity, registry
from mxn.kernels.ops.linear import ways
from mxn.kernels.ops.linear.triton_ import TritonLinear
from mxn.kernels.ops.paged_attention import triton_ as paged
from mxn.kernels.ops.paged_attention.cases import paged_batch, poisoned_cache
from mxn.kernels.ops.paged_attention.naive import paged_attention as truth
from mxn.kernels.ops.paged_attention.triton_ import Rows, UnifiedMax
from support import triton_interpreter

_absence = triton_interpreter.absence()
if _absence:
    pytest.skip(_absence, allow_module_level=True)
triton_interpreter.start()
# Overflow is what the crafted rows are for; a GPU does not warn either.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

CPU = torch.device("cpu")
OPS = ("add_rms_norm", "linear", "mla_attention", "moe", "paged_attention", "rms_norm", "rope")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
def test_triton_kernel_says_what_naive_says(op: str, dtype: torch.dtype) -> None:
    result = parity.check_kernel(registry.kernels_of(op)["triton"], CPU, dtype)
    assert result.num_cases > 0
    assert result.is_passed, "\n".join(result.failures)


@pytest.mark.parametrize("way", ways.ONLY)
@pytest.mark.parametrize(("rows", "k", "n"), [(0, 16, 8), (1, 257, 127), (3, 61, 67), (5, 96, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_way_of_a_product_gives_the_same(way, rows, k, n, has_bias) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(size, generator=generator) for size in ((n, k), (rows, k + 9)))
    bias = torch.randn(n, generator=generator) if has_bias else None
    got = TritonLinear(weight, bias, ways.ONLY[way])(x[:, 3 : 3 + k])
    want = x[:, 3 : 3 + k].double() @ weight.double().T
    assert_same(want.float() if bias is None else (want + bias).float(), got, 1e-4)


def decode_inputs(
    contexts: tuple[int, ...], heads: int = 4, groups: int = 2, dim: int = 16, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, object]:
    """Return q, caches (NaN but for the contexts) and the batch, in float32."""
    make = parity.Maker(seed, torch.float32)
    batch, num_pages = paged_batch(make, tuple((1, c) for c in contexts), 16, False)
    q = make.normal(len(contexts), heads, dim)
    k, v = (poisoned_cache(make, batch, num_pages, groups, dim) for _ in range(2))
    return q, k, v, batch


def decode(q: Tensor, k: Tensor, v: Tensor, batch, scale: float, **options) -> tuple[Tensor, int]:
    """Return what the kernel says and how many (row, head) pairs it recomputed."""
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    before = int(paged.recomputed(CPU))
    paged.decode(
        out, q, k, v, batch.page_table_SP, Rows(batch.context_lens_S), scale,
        max_context=max(batch.context_lens), page_tokens=batch.page_tokens, **options,
    )  # fmt: skip
    return out, int(paged.recomputed(CPU)) - before


def assert_same(want: Tensor, got: Tensor, tolerance: float = 3e-6) -> None:
    _, mismatch = parity.compare("out", want, got, tolerance)
    assert mismatch is None, str(mismatch)


@pytest.mark.parametrize("num_splits", [1, 3, 9])
@pytest.mark.parametrize("unified", [UnifiedMax(), None], ids=["unified", "own maxima"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, 5.0)])
def test_splits_of_ragged_contexts_add_up(num_splits, unified, window, softcap) -> None:
    q, k, v, batch = decode_inputs((1, 64, 65, 150))
    want = truth(q, k, v, batch, 0.25, window, softcap)
    got, count = decode(q, k, v, batch, 0.25, window=window, softcap=softcap, unified=unified,
                        num_splits=num_splits)  # fmt: skip
    assert_same(want, got)
    assert count == 0


def crafted(tops: tuple[float, ...], length: int = 70) -> tuple[Tensor, Tensor, Tensor, object]:
    """Inputs whose largest score in sequence s is exactly `tops[s]`, at its last position."""
    q, k, v, batch = decode_inputs((length,) * len(tops), heads=2, groups=1)
    q.zero_()
    q[..., 0] = 1.0
    for s, top in enumerate(tops):
        scores = top - torch.arange(length, dtype=torch.float32).flip(0) % 7
        for position, score in enumerate(scores.tolist()):
            page = int(batch.page_table_SP[s, position // 16])
            k[page, position % 16, 0, 0] = score
    return q, k, v, batch


# phi = 6 and (-3, 3), the example of the paper; rows 0 and 3 leave the range, one on each side
@pytest.mark.parametrize("num_splits", [1, 3])
def test_guard_fires_for_rows_out_of_range_only_and_the_result_is_exact(num_splits: int) -> None:
    q, k, v, batch = crafted((9.5, 9.0, 6.0, 2.5, 3.0))
    guard = UnifiedMax(phi=6.0, low=-3.0, high=3.0)
    got, count = decode(q, k, v, batch, 1.0, unified=guard, num_splits=num_splits)
    assert count == 2 * 2  # two rows, two heads
    assert_same(truth(q, k, v, batch, 1.0), got)


@settings(max_examples=15, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
    size=st.floats(0.05, 60.0),
    phi=st.floats(-20.0, 20.0),
    reach=st.sampled_from([1.0, 3.0, 50.0]),
    num_splits=st.integers(1, 4),
)
def test_any_phi_and_range_give_the_exact_result(contexts, size, phi, reach, num_splits) -> None:
    q, k, v, batch = decode_inputs(contexts, heads=3, groups=1)
    q *= size
    guard = UnifiedMax(phi=phi, low=-reach, high=reach)
    got, _ = decode(q, k, v, batch, 0.25, unified=guard, num_splits=num_splits)
    # A score of some hundreds has an error of 1e-5 in float32, in the truth too.
    assert_same(truth(q, k, v, batch, 0.25), got, 2e-5)


@pytest.mark.parametrize("top", [-700.0, -95.0, -51.0, 51.0, 95.0, 700.0])
def test_default_guard_keeps_any_score_exact(top: float) -> None:
    q, k, v, batch = crafted((top, 0.0))
    got, count = decode(q, k, v, batch, 1.0, num_splits=2)
    assert count == 2
    assert_same(truth(q, k, v, batch, 1.0), got)


def test_without_the_guard_small_scores_would_be_wrong() -> None:
    """The guard is needed: exp(-95 - 7) has no digits left, yet nothing is infinite or NaN."""
    q, k, v, batch = crafted((-95.0,))
    blind = UnifiedMax(low=float("-inf"), high=float("inf"))
    got, count = decode(q, k, v, batch, 1.0, unified=blind)
    assert count == 0
    assert got.isfinite().all()
    assert parity.compare("out", truth(q, k, v, batch, 1.0), got, 3e-6)[1] is not None


def test_sums_that_overflow_are_recomputed() -> None:
    q, k, v, batch = crafted((45.0, 45.0))
    v[int(batch.page_table_SP[1, 0])] *= 1e30  # exp(45) * 1e30 is no float32
    got, count = decode(q, k, v, batch, 1.0)
    assert count == 2
    assert_same(truth(q, k, v, batch, 1.0), got)


def test_a_nan_in_a_context_stays_in_its_row() -> None:
    q, k, v, batch = crafted((0.0, 0.0))
    v[int(batch.page_table_SP[1, 1]), 3] = float("nan")
    got, _ = decode(q, k, v, batch, 1.0)
    assert got[1].isnan().all()
    assert_same(truth(q, k, v, batch, 1.0)[0], got[0])


@pytest.mark.parametrize("unified", [UnifiedMax(), None], ids=["unified", "own maxima"])
def test_rows_that_pad_a_captured_graph_are_zero_and_read_nothing(unified) -> None:
    q, k, v, batch = decode_inputs((40, 50))
    want = truth(q, k, v, batch, 0.25)
    out = torch.empty(3, 4, 16)
    table = torch.cat((batch.page_table_SP, torch.full_like(batch.page_table_SP[:1], 1 << 40)))
    rows = Rows(torch.tensor([40, 50, 0]))
    before = int(paged.recomputed(CPU))
    paged.decode(out, torch.cat((q, q[:1])), k, v, table, rows, 0.25, max_context=4096,
                 page_tokens=16, unified=unified)  # fmt: skip
    assert_same(want, out[:2])
    assert torch.equal(out[2], torch.zeros(4, 16))
    assert int(paged.recomputed(CPU)) == before


def test_short_speculation_runs_as_rows_beside_decoding_and_a_chunk() -> None:
    make = parity.Maker(3, torch.float32)
    step = ((1, 30), (paged.MAX_ROWS, 21), (paged.MAX_ROWS + 1, 40))
    batch, num_pages = paged_batch(make, step, 16, False)
    q = make.normal(batch.query_starts[-1], 4, 16)
    k, v = (poisoned_cache(make, batch, num_pages, 2, 16) for _ in range(2))
    rows, longest = paged.short_rows(batch)
    assert rows.tokens_R.tolist() == [0, 1, 2, 3, 4]
    assert rows.seen_R.tolist() == [30, 18, 19, 20, 21]
    assert longest == 30
    got = registry.kernels_of("paged_attention")["triton"].fn(q, k, v, batch, 0.25)
    assert_same(truth(q, k, v, batch, 0.25), got)


def test_experts_without_tokens_are_not_read() -> None:
    make = parity.Maker(5, torch.float32)
    x, weights = make.normal(5, 24), make.uniform32(5, 2)
    ids = torch.tensor([[1, 4], [4, 1], [1, 6], [6, 4], [4, 6]])
    gate_up, down = make.normal(9, 64, 24, scale=0.2), make.normal(9, 24, 32, scale=0.2)
    args = (x, weights, ids, gate_up, down, "silu")
    want = registry.kernels_of("moe")["naive"].fn(*args)
    for unused in (0, 2, 3, 5, 7, 8):
        gate_up[unused], down[unused] = float("nan"), float("nan")
    assert_same(want, registry.kernels_of("moe")["triton"].fn(*args))


@pytest.mark.parametrize("pairs", [1, 2, 7, 64, 300])
def test_blocks_cover_every_pair_once(pairs: int) -> None:
    from mxn.kernels.ops.moe.triton_ import Blocks

    make = parity.Maker(pairs, torch.float32)
    ids = make.integers(5, pairs, 1) * 3  # experts 0, 3, … 12 of 16
    blocks = Blocks.of(ids, 16, 8)
    seen = []
    for expert, first, end in zip(
        blocks.experts_b.tolist(), blocks.first_rows_b.tolist(), blocks.end_rows_b.tolist(),
        strict=True,
    ):  # fmt: skip
        if expert < 16:
            places = blocks.order_X[first : min(first + 8, end)]
            assert len(places) > 0
            assert (ids.flatten()[places] == expert).all()
            seen += places.tolist()
    assert sorted(seen) == list(range(pairs))
