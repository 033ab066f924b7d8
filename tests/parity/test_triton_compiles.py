"""Every Triton kernel becomes machine code for chips that are not here. Needs triton, no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "attend_splits", "finish", "norm_rows", "rotate", "gemv", "flat", "add_parts", "flat_int4",
    "quantize_rows", "flat_int8", "gate_up", "down", "combine",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "tools/compile_triton.py", "--json", report, *options],
        cwd=ROOT, env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_kernels_compile_and_use_the_matrix_units_without_spilling(
    target: str, tmp_path: Path
) -> None:
    rows = compiled(tmp_path, "--quick", "--target", target)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["spilled"] == 0 for row in rows)
    products = {"attend_splits", "finish", "flat", "flat_int4", "flat_int8", "gate_up", "down"}
    for row in rows:
        assert bool(row["matrix"]) == (row["kernel"] in products), row
    if target == "cuda:sm_90":  # rows are padded to 8, not to 16 or 64
        for name in ("flat", "flat_int4", "flat_int8"):
            (row,) = (row for row in rows if row["kernel"] == name and "8 rows" in row["job"])
            assert all("n8k" in instruction for instruction in row["matrix"]), row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_shapes_compile_within_shared_memory_and_registers(dtype: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--dtype", dtype)
    assert {row["target"] for row in rows} == {"cuda:sm_90", "hip:gfx942"}
    assert len(rows) > 80
