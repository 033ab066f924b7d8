"""Every kernel that this machine can run against `naive.py`."""

from __future__ import annotations

import pytest
import torch

from mxn.kernels import parity, registry

CPU = torch.device("cpu")
CHIP = "x86-test"  # takes every x86 kernel this torch build can run
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cells(chip: str) -> list[object]:
    return [
        pytest.param(entry, dtype, id=f"{entry.op}-{entry.name}-{registry.dtype_name(dtype)}")
        for dtype in DTYPES
        for entry in parity.applicable(chip, dtype)
        if any(registry.dtype_name(dtype) in case.dtypes for case in parity.cases_of(entry.op))
    ]


@pytest.mark.parametrize(("entry", "dtype"), _cells(CHIP))
def test_kernel_says_what_naive_says(entry: registry.Kernel, dtype: torch.dtype) -> None:
    result = parity.check_kernel(entry, CPU, dtype)
    assert result.num_cases > 0
    assert result.is_passed, "\n".join(result.failures)


@pytest.mark.parametrize("op", registry.all_ops())
def test_every_op_has_odd_shapes_and_a_typical_case(op: str) -> None:
    cases = parity.cases_of(op)
    assert len({case.name for case in cases}) == len(cases)
    assert len(cases) >= 4
    if not registry.all_ops()[op].is_prepared:
        assert parity.typical_cases(op)
