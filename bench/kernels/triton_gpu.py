"""Times the Triton kernels on a GPU beside torch (SDPA, cuBLAS or hipBLAS) and flash-attn.

    python bench/kernels/triton_gpu.py [--only attention,linear] [--rounds 30]

Needs a GPU that torch calls `cuda` and triton; says so and stops where there is none. flash-attn is
timed when it is installed. Kernels that fail their parity test on this GPU are not timed.

Every contender is captured in a CUDA graph (decoding runs in graphs; a launch from Python would
cost more than the kernel) that works through copies of its inputs larger than the cache, and the
graphs take turns. What waits for the host cannot be captured and is timed as it is (graph: false).
Prints a table, then one line of JSON: microseconds p20, p50, p80, and bytes that must be read by
second against the copy bandwidth measured in the same minute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mxn.kernels import parity, triton_host
from mxn.kernels.ops.linear.packed import Int4Weight, Int8Weight
from mxn.kernels.ops.linear.triton_quantized import TritonInt4Linear, TritonInt8Linear
from mxn.kernels.ops.paged_attention import triton_ as paged
from mxn.kernels.ops.paged_attention.cases import paged_batch
from mxn.kernels.registry import kernels_of

COLD_BYTES = 256 << 20  # more than any cache: H200 50 MiB, MI300X 256 MiB of slow cache
DTYPE = torch.bfloat16
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Contenders for one shape. Each has one run for each copy of the inputs."""

    name: str
    num_bytes: int  # that must be read, at the least
    runs: dict[str, list[Run]]
    uncapturable: frozenset[str] = frozenset()
    packed_bytes: dict[str, int] = field(default_factory=dict)  # of contenders that read fewer


@dataclass
class Timed:
    """Microseconds of one call of each contender, one number for each round."""

    graph: Callable[[], object]
    calls: int
    is_graph: bool
    us: list[float] = field(default_factory=list)


def copies_of(num_bytes: int) -> int:
    return max(1, min(32, -(-COLD_BYTES // max(1, num_bytes))))


def attention_cases(device: torch.device) -> Iterator[Case]:
    """Decode at the shape of Llama-3 8B: 32 query heads, 8 key heads of 128 dims."""
    heads, groups, dim = 32, 8, 128
    scale = dim**-0.5
    for sequences, context in ((1, 2048), (1, 8192), (16, 2048), (16, 8192), (64, 2048)):
        num_bytes = 2 * sequences * context * groups * dim * DTYPE.itemsize
        runs: dict[str, list[Run]] = {}
        for _ in range(copies_of(num_bytes)):
            make = parity.Maker(7, DTYPE)
            batch, pages = paged_batch(make, ((1, context),) * sequences, 16, False)
            args = parity._moved(batch, device)
            q = torch.randn(sequences, heads, dim, dtype=DTYPE, device=device)
            k, v = (
                torch.randn(pages, 16, groups, dim, dtype=DTYPE, device=device) for _ in range(2)
            )
            rows = paged.Rows(args.context_lens_S)
            add(runs, "mxn triton, unified maximum", decoder(q, k, v, args, rows, scale))
            add(runs, "mxn triton, own maxima",
                decoder(q, k, v, args, rows, scale, unified=None))  # fmt: skip
            op = kernels_of("paged_attention")["torch"].fn
            add(runs, "mxn torch (gathers pages)", bound(op, q, k, v, args, scale))
            flat = [x[: sequences * context // 16].view(sequences, context, groups, dim)
                    for x in (k, v)]  # fmt: skip
            add_rivals(runs, q, *flat, scale)
        yield Case(f"attention S={sequences} L={context}", num_bytes, runs)


def decoder(q: Tensor, k: Tensor, v: Tensor, batch: Any, rows: Any, scale: float, **options: Any):
    out = torch.empty_like(q)
    return lambda: paged.decode(
        out, q, k, v, batch.page_table_SP, rows, scale, max_context=max(batch.context_lens),
        page_tokens=batch.page_tokens, **options,
    )  # fmt: skip


def add_rivals(
    runs: dict[str, list[Run]], q: Tensor, k_SLGH: Tensor, v_SLGH: Tensor, scale: float
) -> None:
    """Add SDPA and flash-attn on contiguous caches: they need not follow a page table."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q_SNH, k, v = q.unsqueeze(2), k_SLGH.transpose(1, 2), v_SLGH.transpose(1, 2)
    add(runs, "torch SDPA, contiguous", lambda: sdpa(q_SNH, k, v, scale=scale, enable_gqa=True))
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        lens = torch.full((len(q),), k_SLGH.shape[1], dtype=torch.int32, device=q.device)
        q_S1 = q.unsqueeze(1)
        add(runs, "flash-attn, contiguous",
            lambda: flash_attn_with_kvcache(q_S1, k_SLGH, v_SLGH, cache_seqlens=lens,
                                            softmax_scale=scale, causal=True))  # fmt: skip


def latent_cases(device: torch.device) -> Iterator[Case]:
    """Decode in latent form at the shape of DeepSeek-V3: 128 heads, rows of 512 + 64."""
    for sequences, context in ((1, 4096), (16, 4096)):
        num_bytes = sequences * context * 576 * DTYPE.itemsize
        runs: dict[str, list[Run]] = {}
        for _ in range(copies_of(num_bytes)):
            make = parity.Maker(7, DTYPE)
            batch, pages = paged_batch(make, ((1, context),) * sequences, 16, False)
            args = parity._moved(batch, device)
            q = torch.randn(sequences, 128, 576, dtype=DTYPE, device=device)
            cache = torch.randn(pages, 16, 1, 576, dtype=DTYPE, device=device)
            for name in ("triton", "torch"):
                op = kernels_of("mla_attention")[name].fn
                add(runs, f"mxn {name}", bound(op, q, cache, args, 576**-0.5, 512))
        yield Case(f"mla S={sequences} L={context}", num_bytes, runs)


def linear_cases(device: torch.device) -> Iterator[Case]:
    """The products of a decoder of 8B, bf16 and packed, for few rows."""
    for k, n in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)):
        num_bytes = k * n * DTYPE.itemsize
        weights = [
            torch.randn(n, k, dtype=DTYPE, device=device) for _ in range(copies_of(num_bytes))
        ]
        int4 = [TritonInt4Linear(Int4Weight.quantize(w)) for w in weights]
        int8 = [TritonInt8Linear(Int8Weight.quantize(w)) for w in weights]
        plain = [kernels_of("linear")["triton"].fn(w) for w in weights]
        for m in (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(m, k, dtype=DTYPE, device=device)
            runs = {
                "torch (cuBLAS)": [bound(torch.nn.functional.linear, x, w) for w in weights],
                "mxn triton": [bound(f, x) for f in plain],
                "mxn triton W4A16 g128": [bound(f, x) for f in int4],
                "mxn triton W8A8": [bound(f, x) for f in int8],
            }
            fewer = {
                "mxn triton W4A16 g128": int4[0].num_bytes,
                "mxn triton W8A8": int8[0].num_bytes,
            }
            yield Case(f"linear {k}x{n} M={m}", num_bytes, runs, packed_bytes=fewer)


def expert_cases(device: torch.device) -> Iterator[Case]:
    """Qwen3-30B-A3B: 128 experts, 8 for each token."""
    experts, top_k, dim, inner = 128, 8, 2048, 768
    gate_up = torch.randn(experts, 2 * inner, dim, dtype=DTYPE, device=device) * dim**-0.5
    down = torch.randn(experts, dim, inner, dtype=DTYPE, device=device) * inner**-0.5
    for tokens in (1, 16, 64, 512):
        ids = torch.rand(tokens, experts, device=device).argsort(dim=1)[:, :top_k].contiguous()
        used = len(ids.unique())
        x = torch.randn(tokens, dim, dtype=DTYPE, device=device)
        args = (x, torch.rand(tokens, top_k, device=device), ids, gate_up, down, "silu")
        runs = {f"mxn {n}": [bound(kernels_of("moe")[n].fn, *args)] for n in ("triton", "torch")}
        yield Case(f"moe T={tokens} experts used={used}", used * 3 * dim * inner * DTYPE.itemsize,
                   runs, frozenset({"mxn torch"}))  # fmt: skip


def small_cases(device: torch.device) -> Iterator[Case]:
    for op in ("rms_norm", "add_rms_norm", "rope"):
        for case in parity.typical_cases(op):
            args = case.arguments(device, DTYPE)
            num_bytes = sum(part.nbytes for part in args if isinstance(part, Tensor))
            runs = {f"mxn {n}": [bound(kernels_of(op)[n].fn, *args)] for n in ("triton", "torch")}
            yield Case(case.name, num_bytes, runs)


GROUPS = {
    "attention": (("paged_attention",), attention_cases),
    "mla": (("mla_attention",), latent_cases),
    "linear": (("linear",), linear_cases),
    "moe": (("moe",), expert_cases),
    "small": (("rms_norm", "add_rms_norm", "rope"), small_cases),
}


def add(runs: dict[str, list[Run]], name: str, run: Run) -> None:
    runs.setdefault(name, []).append(run)


def bound(fn: Callable[..., object], *args: Any) -> Run:
    return lambda: fn(*args)


def prepared(runs: list[Run], is_graph: bool) -> Timed:
    """Warm up (compile, allocate), then capture all copies in one graph."""

    def all_copies() -> None:
        for run in runs:
            run()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_copies()
        all_copies()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if not is_graph:
        return Timed(all_copies, len(runs), False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_copies()
    return Timed(graph.replay, len(runs), True)


def measure(case: Case, rounds: int) -> dict[str, Timed]:
    """Return the times of each contender; they take turns."""
    timed = {n: prepared(runs, n not in case.uncapturable) for n, runs in case.runs.items()}
    for _ in range(rounds):
        for one in timed.values():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            one.graph()
            end.record()
            end.synchronize()
            one.us.append(start.elapsed_time(end) * 1e3 / one.calls)
    return timed


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes read and written by second when a GiB is copied, best of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    case = Case("copy", source.nbytes, {"copy": [lambda: target.copy_(source)]})
    return 2 * source.nbytes / min(measure(case, 10)["copy"].us) * 1e6


def failed_parity(ops: tuple[str, ...], device: torch.device) -> list[str]:
    results = [parity.check_kernel(kernels_of(op)["triton"], device, DTYPE) for op in ops]
    return [failure for result in results for failure in result.failures]


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[len(ordered) * q // 100], 2) for q in (20, 50, 80)}


def run(device: torch.device, names: list[str], rounds: int) -> tuple[list[dict], list[str]]:
    """Return one row for each case, and what failed its parity test and was not timed."""
    bandwidth, rows, red = copy_bandwidth(device), [], []
    for name in names:
        ops, cases = GROUPS[name]
        if failures := failed_parity(ops, device):
            red += failures
            continue
        for case in cases(device):
            row: dict[str, Any] = {"case": case.name, "us": {}, "of_copy_bandwidth": {}}
            for contender, timed in measure(case, rounds).items():
                found = quantiles(timed.us)
                num_bytes = case.packed_bytes.get(contender, case.num_bytes)
                rate = num_bytes / found["p50"] * 1e6 / bandwidth
                row["us"][contender] = found | {"graph": timed.is_graph}
                row["of_copy_bandwidth"][contender] = round(rate, 3)
                print(f"{case.name:36} {contender:28} {found['p50']:10.1f} us  {rate:5.0%}")
            rows.append(row)
            torch.cuda.empty_cache()
    return rows, red


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"of {', '.join(GROUPS)}; separated by commas")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    report: dict[str, Any] = {"schema": 1, "case": "triton_gpu"}
    if reason := triton_host.missing("bfloat16"):
        print(f"skipped: {reason}; these times need a GPU", file=sys.stderr)
        print(json.dumps(report | {"skipped": reason}))
        return 0
    device = torch.device("cuda")
    names = options.only.split(",") if options.only else list(GROUPS)
    with torch.inference_mode():
        rows, red = run(device, names, options.rounds)
    print("\n".join(red), file=sys.stderr)
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "triton", "flash_attn")
        if importlib.util.find_spec(package)
    }
    report |= {"machine": torch.cuda.get_device_name(device), "versions": versions,
               "rounds": options.rounds, "failed_parity": red, "rows": rows,
               "basis": "measured"}  # fmt: skip
    print(json.dumps(report))
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
