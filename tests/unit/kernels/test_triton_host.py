"""Triton kernels where there is no triton, no GPU or no NVIDIA and AMD chip: never chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxn.errors import UnsupportedError
from mxn.kernels import registry, triton_host
from mxn.kernels.registry import Ops

OPS = ("add_rms_norm", "linear", "mla_attention", "moe", "paged_attention", "rms_norm", "rope")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    monkeypatch.delenv("MXN_KERNELS", raising=False)


def test_kernels_register_without_triton_and_load_no_device_code() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mxn.kernels import registry\n"
        f"assert all('triton' in registry.kernels_of(op) for op in {OPS})\n"
        "sys.exit(any('triton_code' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_never_gets_a_triton_kernel_even_beside_a_gpu(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = registry.kernels_of(op)["triton"]
    monkeypatch.setattr(triton_host.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for chip in ("x86-avx512-vnni", "arm64-neon", "sim-8", "ascend-910b3", "unknown-cuda"):
        assert "is for chips" in (entry.reject_reason(chip, "bfloat16") or "")
    for chip in ("nvidia-h200", "amd-mi300x"):
        assert entry.reject_reason(chip, "bfloat16") is None


@pytest.mark.parametrize(
    ("has_triton", "has_gpu", "capability", "reason"),
    [
        (False, True, (9, 0), "triton is not installed"),
        (True, False, (9, 0), "sees no GPU"),
        (True, True, (7, 5), "bfloat16 needs compute capability 8.0, this is 7.5"),
        (True, True, (9, 0), None),
    ],
)
def test_missing_says_why(has_triton, has_gpu, capability, reason, monkeypatch) -> None:
    spec = object() if has_triton else None
    monkeypatch.setattr(triton_host.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    found = triton_host.missing("bfloat16")
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_pin_says_why_triton_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_KERNELS", "moe=triton")
    with pytest.raises(
        UnsupportedError, match=r"moe=triton.*(sees no GPU|triton is not installed)"
    ):
        Ops.bind("cpu", "nvidia-h200", torch.bfloat16)


def test_an_empty_grid_starts_nothing() -> None:
    started: list[object] = []
    chip = triton_host.Target("hip", 304, has_tf32=False)
    with triton_host.redirected(lambda *call: started.append(call), chip):
        triton_host.launch("kernel", (3, 0))
        assert started == []
        triton_host.launch("kernel", (3, 1), 5, BLOCK=2)
        assert triton_host.backend() == "hip"
        assert triton_host.num_processors(torch.device("cpu")) == 304
        assert not triton_host.has_tf32(torch.ones(1, dtype=torch.float16))
    assert triton_host.num_processors(torch.device("cpu")) == 8
    assert started == [("kernel", (3, 1), (5,), {"BLOCK": 2})]


def test_powers_of_two() -> None:
    assert [triton_host.power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert triton_host.power_of_two(5, least=16) == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "bench/kernels/triton_gpu.py"],
        cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped: " in done.stderr
    assert '"skipped"' in done.stdout.splitlines()[-1]
