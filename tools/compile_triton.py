"""Compile every Triton kernel for chips that are not here, at the shapes of real models.

    python tools/compile_triton.py             # sm_90 and gfx942, all kernels and shapes, bfloat16
    python tools/compile_triton.py --quick     # each kernel once
    python tools/compile_triton.py --target hip:gfx942 --only linear --dtype float16 --json out.json

The host code of each op runs on tensors without memory; each launch is compiled instead of
started, down to machine code. So what is checked is what would be launched, with its tile sizes. It
does not say that results are right (tests/parity/test_triton.py does) nor how fast they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as 3.9 does by default, without a warning

import torch
import triton
from triton.backends.compiler import GPUTarget

from mxn.kernels import triton_host as host
from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.linear.packed import Int4Weight, Int8Weight
from mxn.kernels.ops.linear.triton_ import TritonLinear
from mxn.kernels.ops.linear.triton_quantized import TritonInt4Linear, TritonInt8Linear
from mxn.kernels.ops.linear.ways import ESTIMATE, ONLY, Bounds
from mxn.kernels.registry import kernels_of

TARGETS = {
    "cuda:sm_90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "cuda:sm_80": GPUTarget("cuda", 80, 32),
    "cuda:sm_120": GPUTarget("cuda", 120, 32),
    "hip:gfx90a": GPUTarget("hip", "gfx90a", 64),
    "hip:gfx1100": GPUTarget("hip", "gfx1100", 32),
}
DEFAULT_TARGETS = ("cuda:sm_90", "hip:gfx942")
# What one program may have, less what the system keeps.
SHARED_BYTES = {"cuda:sm_80": 163 << 10, "cuda:sm_90": 227 << 10, "cuda:sm_120": 99 << 10}
AMD_SHARED_BYTES = 64 << 10
PROCESSORS = {"cuda": 132, "hip": 304}  # H100, MI300X: they decide how work is cut
MATRIX = ("wgmma.mma", "mma.sync", "v_mfma", "v_wmma")
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in machine code. `matrix`: the distinct matrix instructions in it."""

    job: str
    kernel: str
    target: str
    dtype: str
    shared_bytes: int
    registers: int  # of each thread
    spilled: int  # bytes (NVIDIA: local memory) or registers (AMD) of each thread
    code_bytes: int
    matrix: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """A call of the host side of an op, at the shape of a real model."""

    name: str
    op: str
    call: Callable[[torch.dtype], object]
    is_quick: bool = False


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def decode_batch(sequences: int, context: int, page_tokens: int = 16) -> AttentionBatch:
    pages = -(-context // page_tokens)
    return AttentionBatch(
        query_starts=list(range(sequences + 1)),
        context_lens=[context] * sequences,
        page_table_SP=empty(sequences, pages, dtype=torch.int64),
        context_lens_S=empty(sequences, dtype=torch.int64),
        query_starts_S1=empty(sequences + 1, dtype=torch.int64),
        slots_T=empty(sequences, dtype=torch.int64),
        page_tokens=page_tokens,
    )


def kernel(op: str) -> Callable[..., Any]:
    return kernels_of(op)["triton"].fn


def attention(
    heads: int, groups: int, dim: int, window: int | None = None, softcap: float | None = None
) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        q, cache = empty(16, heads, dim, dtype=dtype), empty(999, 16, groups, dim, dtype=dtype)
        batch = decode_batch(16, 4096)
        return kernel("paged_attention")(q, cache, cache, batch, dim**-0.5, window, softcap)

    return call


def latent_attention(heads: int) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        q, cache = empty(16, heads, 576, dtype=dtype), empty(999, 16, 1, 576, dtype=dtype)
        return kernel("mla_attention")(q, cache, decode_batch(16, 4096), 576**-0.5, 512)

    return call


def norms(dims: int) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        x, weight = empty(16, dims, dtype=dtype), empty(dims, dtype=dtype)
        kernel("rms_norm")(x, weight, 1e-6)
        return kernel("add_rms_norm")(x, x, weight, 1e-6)

    return call


def rotary(dim: int, half: int, is_interleaved: bool) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        q, k = empty(16, 32, dim, dtype=dtype), empty(16, 8, dim, dtype=dtype)
        return kernel("rope")(q, k, empty(16, half), empty(16, half), is_interleaved)

    return call


def product(
    num_rows: int, in_features: int, out_features: int, bounds: Bounds = ESTIMATE
) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        weight, bias = (
            empty(out_features, in_features, dtype=dtype),
            empty(out_features, dtype=dtype),
        )
        return TritonLinear(weight, bias, bounds)(empty(num_rows, in_features, dtype=dtype))

    return call


def int4_product(num_rows: int, group_size: int) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        values = empty(6144, 2048, dtype=torch.uint8)
        groups = (6144, 4096 // group_size)
        weight = Int4Weight(values, empty(*groups), empty(*groups, dtype=torch.uint8), group_size)
        return TritonInt4Linear(weight)(empty(num_rows, 4096, dtype=dtype))

    return call


def int8_product(num_rows: int) -> Callable[[torch.dtype], object]:
    def call(dtype: torch.dtype) -> object:
        weight = Int8Weight(empty(6144, 4096, dtype=torch.int8), empty(6144))
        return TritonInt8Linear(weight)(empty(num_rows, 4096, dtype=dtype))

    return call


def experts(tokens: int, count: int, top_k: int, dim: int, inner: int, kind: str = "silu"):
    def call(dtype: torch.dtype) -> object:
        return kernel("moe")(
            empty(tokens, dim, dtype=dtype), empty(tokens, top_k),
            empty(tokens, top_k, dtype=torch.int64), empty(count, 2 * inner, dim, dtype=dtype),
            empty(count, dim, inner, dtype=dtype), kind,
        )  # fmt: skip

    return call


JOBS = (
    Job("Llama-3 8B, 4 queries a key head", "paged_attention", attention(32, 8, 128), True),
    Job("Gemma-2 9B, window and cap", "paged_attention", attention(16, 8, 256, 4096, 50.0)),
    Job("heads of 192 = 128 + 64", "paged_attention", attention(16, 16, 192)),
    Job("DeepSeek-V3, 128 heads", "mla_attention", latent_attention(128)),
    Job("DeepSeek-V2-Lite, 16 heads", "mla_attention", latent_attention(16), True),
    Job("4096 dims", "rms_norm", norms(4096), True),
    Job("halves", "rope", rotary(128, 64, False), True),
    Job("partial, interleaved", "rope", rotary(192, 32, True)),
    Job("1 row", "linear", product(1, 4096, 6144), True),
    Job("4 rows, one by one", "linear", product(4, 4096, 6144, ONLY["gemv"])),
    Job("8 rows", "linear", product(8, 4096, 6144)),
    Job("64 rows", "linear", product(64, 4096, 28672)),
    Job("8 rows, small F: parts of D", "linear", product(8, 14336, 1024), True),
    Job("int4 g128, 8 rows", "linear", int4_product(8, 128), True),
    Job("int4 g64, 64 rows", "linear", int4_product(64, 64)),
    Job("int4 g32, 1 row", "linear", int4_product(1, 32)),
    Job("int8, 8 rows", "linear", int8_product(8), True),
    Job("int8, 64 rows", "linear", int8_product(64)),
    Job("Qwen3-30B-A3B, 16 tokens", "moe", experts(16, 128, 8, 2048, 768), True),
    Job("DeepSeek-V3, 512 tokens", "moe", experts(512, 256, 8, 7168, 2048)),
)
# Numbers that are 1 become constants of the kernel: another program, with its own mistakes.
ONES = (
    Job("ones", "paged_attention", attention(1, 1, 1, 1, 1.0)),
    Job("ones", "rms_norm", norms(1)),
    Job("ones", "rope", rotary(2, 1, False)),
    Job("ones", "linear", product(1, 1, 1)),
    Job("ones", "linear", product(2, 1, 1)),
    *(Job(f"ones, {kind}", "moe", experts(1, 1, 1, 1, 1, kind))
      for kind in ("silu", "gelu", "gelu_tanh", "relu")),
)  # fmt: skip


class OfflineDriver:
    """What Triton asks of a chip before it compiles, answered for a chip that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace()


def compile_jobs(target_name: str, dtype_name: str, jobs: tuple[Job, ...]) -> Iterator[Compiled]:
    """Yield what each job would launch. Raises: whatever the compiler does, with the job's name."""
    target, dtype = TARGETS[target_name], getattr(torch, dtype_name)
    triton.runtime.driver.set_active(OfflineDriver(target))
    found: list[Compiled] = []
    job = jobs[0]

    def runner(code: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict) -> None:
        start = time.perf_counter()
        made = code.warmup(*args, grid=grid, **options)
        seconds = time.perf_counter() - start
        is_cuda = target.backend == "cuda"
        binary = made.asm["cubin" if is_cuda else "hsaco"]
        text = made.asm["ptx" if is_cuda else "amdgcn"]
        used = cuda_registers(binary) if is_cuda else hip_registers(text)
        found.append(
            Compiled(job.name, code.__name__, target_name, dtype_name, made.metadata.shared,
                     *used, len(binary), matrix_instructions(text), round(seconds, 2))
        )  # fmt: skip

    has_tf32 = target.backend == "cuda" or target.arch == "gfx942"
    chip = host.Target(target.backend, PROCESSORS[target.backend], has_tf32)
    with host.redirected(runner, chip):
        for job in jobs:
            try:
                job.call(dtype)
            except Exception as error:
                error.add_note(f"while compiling {job.op} ({job.name}) for {target_name}")
                raise
            yield from found
            found.clear()


def matrix_instructions(text: str) -> tuple[str, ...]:
    """Return the names of the matrix instructions in PTX or GCN assembly."""
    words = {line.split()[0] for line in text.splitlines() if line.split()}
    return tuple(sorted(w for w in words if w.startswith(MATRIX)))


def cuda_registers(binary: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes of each thread, as NVIDIA's cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return counts["REG"], counts["LOCAL"] + counts["STACK"]


def hip_registers(text: str) -> tuple[int, int]:
    """Return vector registers and spilled ones of each thread, from the notes of the assembly."""
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr\w*count):\s+(\d+)", text)}
    return counts["vgpr_count"], counts["vgpr_spill_count"]


def problems(made: Compiled) -> list[str]:
    limit = SHARED_BYTES.get(made.target, AMD_SHARED_BYTES)
    found = []
    if made.shared_bytes > limit:
        found.append(f"{made.kernel} ({made.job}) needs {made.shared_bytes} bytes of shared memory "
                     f"on {made.target}, which has {limit}")  # fmt: skip
    if made.spilled:
        found.append(f"{made.kernel} ({made.job}) spills {made.spilled} on {made.target}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS,
                        help=f"default: {' and '.join(DEFAULT_TARGETS)}")  # fmt: skip
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one shape for each kernel")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--json", type=Path, help="write what was compiled")
    options = parser.parse_args()
    wanted = set(options.only.split(",")) if options.only else {job.op for job in JOBS}
    jobs = tuple(job for job in (*JOBS, *ONES) if job.op in wanted)
    if options.quick:
        jobs = tuple(job for job in JOBS if job.op in wanted and job.is_quick)
    done: list[Compiled] = []
    for target in options.target or DEFAULT_TARGETS:
        for made in compile_jobs(target, options.dtype, jobs):
            done.append(made)
            print(f"{target}  {made.kernel:14} {made.job:32} {made.shared_bytes:7} B shared "
                  f"{made.registers:4} registers {made.spilled:4} spilled {made.seconds:5.2f} s  "
                  f"{' '.join(made.matrix)}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps([asdict(made) for made in done], indent=1) + "\n")
    wrong = [text for made in done for text in problems(made)]
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
