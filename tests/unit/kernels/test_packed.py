"""Rounding of rows to int8 where float32 itself ends; products are in the parity tests."""

from __future__ import annotations

import math

import pytest
import torch

from mxn.kernels.ops.linear.packed import quantize_rows


@pytest.mark.parametrize("size", [1e-44, 1e-40, 2e-38, 1.4e-36])
def test_a_row_of_subnormal_numbers_is_off_by_less_than_a_subnormal(size: float) -> None:
    x = torch.tensor([[size, 0.0, -size / 3, 0.0], [1.0, 0.0, -0.5, 2.0]])
    values, scales = quantize_rows(x)
    assert values[1].tolist() == [64, 0, -32, 127]
    assert values[0, 1] == values[0, 3] == 0
    assert (values[0] * scales[0] - x[0]).abs().max() <= max(size / 250, 2.0**-127)


def test_a_row_with_a_fault_keeps_it_in_its_scale() -> None:
    _, scales = quantize_rows(torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]]))
    assert scales[0].isnan()
    assert scales[1].isinf()
    assert scales[2] == 0
