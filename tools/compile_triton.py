"""Compile every Triton kernel for chips that are not here, at the shapes of real models.

    python tools/compile_triton.py                       # sm_90 and gfx942, all kernels, bfloat16
    python tools/compile_triton.py --target hip:gfx942 --only linear --dtype float16 --json out.json

The host code of each op runs on tensors without memory; each launch is compiled instead of started,
down to machine code. So what is checked is what would be launched, with its tile sizes. It does not
say that results are right (the interpreter does: tests/parity/test_triton.py) nor how fast they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget

from mxn.kernels import triton_host as host
from mxn.kernels.batch import AttentionBatch
from mxn.kernels.registry import kernels_of

TARGETS = {
    "cuda:sm_90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may have: H100 228 KiB less what the system keeps, MI300 64 KiB.
SHARED_BYTES = {"cuda:sm_90": 227 << 10, "hip:gfx942": 64 << 10}
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in machine code. `matrix`: the distinct matrix instructions in it."""

    job: str
    kernel: str
    target: str
    dtype: str
    shared_bytes: int
    code_bytes: int
    matrix: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """A call of the host side of an op, at the shape of a real model."""

    name: str
    op: str
    call: Callable[[torch.dtype], object]


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


JOBS = (
    Job("Llama-3 8B, 4 queries a key head", "paged_attention", attention(32, 8, 128)),
    Job("Gemma-2 9B, window and cap", "paged_attention", attention(16, 8, 256, 4096, 50.0)),
    Job("heads of 192 = 128 + 64", "paged_attention", attention(16, 16, 192)),
    Job("DeepSeek-V3, 128 heads", "mla_attention", latent_attention(128)),
    Job("DeepSeek-V2-Lite, 16 heads", "mla_attention", latent_attention(16)),
    Job("4096 dims", "rms_norm", norms(4096)),
    Job("halves", "rope", rotary(128, 64, False)),
    Job("partial, interleaved", "rope", rotary(192, 32, True)),
)


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
        binary = made.asm["cubin" if target.backend == "cuda" else "hsaco"]
        text = made.asm["ptx" if target.backend == "cuda" else "amdgcn"]
        found.append(
            Compiled(job.name, code.__name__, target_name, dtype_name, made.metadata.shared,
                     len(binary), matrix_instructions(text), round(seconds, 2))
        )  # fmt: skip

    with host.redirected(runner, target.backend):
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
    return tuple(sorted(w for w in words if w.startswith(("wgmma.mma", "mma.sync", "v_mfma"))))


def problems(made: Compiled) -> list[str]:
    limit = SHARED_BYTES[made.target]
    if made.shared_bytes > limit:
        return [f"{made.kernel} ({made.job}) needs {made.shared_bytes} bytes of shared memory on "
                f"{made.target}, which has {limit}"]  # fmt: skip
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--json", type=Path, help="write what was compiled")
    options = parser.parse_args()
    wanted = set(options.only.split(",")) if options.only else {job.op for job in JOBS}
    jobs = tuple(job for job in JOBS if job.op in wanted)
    done: list[Compiled] = []
    for target in options.target or TARGETS:
        for made in compile_jobs(target, options.dtype, jobs):
            done.append(made)
            print(f"{target}  {made.kernel:22} {made.job:34} {made.shared_bytes:7} B shared "
                  f"{made.seconds:6.2f} s  {' '.join(made.matrix)}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps([asdict(made) for made in done], indent=1) + "\n")
    wrong = [text for made in done for text in problems(made)]
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
