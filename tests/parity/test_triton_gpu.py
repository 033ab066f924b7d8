"""The Triton kernels compiled and run on a GPU. Skipped where there is none; see test_triton.py."""

from __future__ import annotations

import pytest
import torch

from mxn.kernels import parity, registry, triton_host
from mxn.kernels.ops.linear import packed
from mxn.kernels.ops.linear.packed import Int4Weight, Int8Weight
from mxn.kernels.ops.linear.triton_quantized import TritonInt4Linear, TritonInt8Linear
from mxn.kernels.ops.paged_attention import triton_ as paged
from mxn.kernels.ops.paged_attention.naive import paged_attention as truth
from mxn.kernels.ops.paged_attention.triton_ import Rows, UnifiedMax

_absence = triton_host.missing("bfloat16")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_absence is not None, reason=f"no kernel can run: {_absence}"),
]

OPS = ("add_rms_norm", "linear", "mla_attention", "moe", "paged_attention", "rms_norm", "rope")


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_kernel_says_what_naive_says(op: str, dtype: torch.dtype, gpu: torch.device) -> None:
    entry = registry.kernels_of(op)["triton"]
    name = registry.dtype_name(dtype)
    if entry.dtypes is not None and name not in entry.dtypes:
        pytest.skip(f"{op} in Triton is for {', '.join(entry.dtypes)}")
    result = parity.check_kernel(entry, gpu, dtype)
    assert result.is_passed, "\n".join(result.failures)


def contexts(gpu: torch.device, *lens: int):
    make = parity.Maker(1, torch.bfloat16)
    q, k, v = (make.normal(*s) for s in ((len(lens), 8, 64), (40, 16, 2, 64), (40, 16, 2, 64)))
    table = make.permutation(39)[: 10 * len(lens)].reshape(len(lens), 10)
    return *(x.to(gpu) for x in (q, k, v, table)), torch.tensor(lens, device=gpu)


def exact(q, k, v, table, lens, scale: float) -> torch.Tensor:
    """The truth for contexts on the device."""
    from mxn.kernels.batch import AttentionBatch

    count = len(lens)
    batch = AttentionBatch(
        query_starts=list(range(count + 1)), context_lens=lens.tolist(), page_table_SP=table.cpu(),
        context_lens_S=lens.cpu(), query_starts_S1=torch.arange(count + 1),
        slots_T=torch.zeros(count, dtype=torch.int64), page_tokens=16,
    )  # fmt: skip
    return truth(q.cpu(), k.cpu(), v.cpu(), batch, scale)


def test_a_captured_decode_follows_new_contexts_pages_and_queries(gpu: torch.device) -> None:
    q, k, v, table, lens = contexts(gpu, 5, 64, 150)
    out = torch.full_like(q, float("nan"))

    def decode() -> None:
        paged.decode(out, q, k, v, table, Rows(lens), 0.125, max_context=160, page_tokens=16)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    for new_lens in ((6, 65, 151), (160, 1, 17)):
        lens.copy_(torch.tensor(new_lens))
        table.copy_(table.flip(0))
        q.mul_(-0.5)
        out.fill_(float("nan"))
        graph.replay()
        _, mismatch = parity.compare("out", exact(q, k, v, table, lens, 0.125), out, 1.2e-2)
        assert mismatch is None, str(mismatch)


def test_guard_fires_and_the_result_is_exact(gpu: torch.device) -> None:
    q, k, v, table, lens = contexts(gpu, 33, 90)
    q[0] *= 300  # scores of some hundreds
    out = torch.full_like(q, float("nan"))
    before = int(paged.recomputed(gpu))
    paged.decode(out, q, k, v, table, Rows(lens), 1.0, max_context=160, page_tokens=16,
                 unified=UnifiedMax(), num_splits=2)  # fmt: skip
    assert int(paged.recomputed(gpu)) > before
    _, mismatch = parity.compare("out", exact(q, k, v, table, lens, 1.0), out, 1.2e-2)
    assert mismatch is None, str(mismatch)


@pytest.mark.parametrize("num_rows", [1, 7, 64, 100])
def test_packed_products_are_those_of_the_expanded_weights(
    num_rows: int, gpu: torch.device
) -> None:
    make = parity.Maker(2, torch.bfloat16)
    weight, x = make.normal32(67, 2048, scale=2048**-0.5).to(gpu), make.normal(num_rows, 2048)
    values, scales = packed.quantize_rows(x)
    int4, int8 = Int4Weight.quantize(weight), Int8Weight.quantize(weight)
    for name, left, right, got in (
        ("int4", x.double(), int4.dequantized(), TritonInt4Linear(int4)(x.to(gpu))),
        ("int8", values.double() * scales.double()[:, None], int8.dequantized(),
         TritonInt8Linear(int8)(x.to(gpu))),
    ):  # fmt: skip
        want = (left @ right.double().cpu().T).to(torch.bfloat16)
        _, mismatch = parity.compare(name, want, got, parity.TOLERANCES["bfloat16"])
        assert mismatch is None, str(mismatch)
