"""The packed linear layers in Triton against their `dequantized()` weights, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mxn.errors import ConfigError
from mxn.kernels import parity
from mxn.kernels.ops.linear import packed, triton_quantized
from mxn.kernels.ops.linear.packed import Int4Weight, Int8Weight
from mxn.kernels.ops.linear.triton_quantized import TritonInt4Linear, TritonInt8Linear
from support import triton_interpreter

_absence = triton_interpreter.absence()
if _absence:
    pytest.skip(_absence, allow_module_level=True)
triton_interpreter.start()
# Overflow is what the crafted rows are for; a GPU does not warn either.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, in features, out features; the last cuts D into parts
SHAPES = ((0, 128, 5), (1, 128, 1), (3, 256, 67), (17, 384, 40), (70, 128, 33), (2, 2048, 13))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    make = parity.Maker(rows * in_features + out_features, dtype)
    weight = make.normal32(out_features, in_features, scale=in_features**-0.5)
    return weight, make.normal(out_features), make.normal(rows, in_features)


def assert_product(x_MD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, got: Tensor) -> None:
    want = x_MD.double() @ weight_FD.double().T
    want = (want if bias_F is None else want + bias_F.double()).to(got.dtype)
    tolerance = parity.TOLERANCES[str(got.dtype).removeprefix("torch.")]
    _, mismatch = parity.compare("y", want, got, tolerance)
    assert mismatch is None, str(mismatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", packed.GROUP_SIZES)
def test_int4_product_is_that_of_the_expanded_weight(group_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight, bias, x = inputs(*shape, dtype)
        quantized = Int4Weight.quantize(weight, group_size)
        linear = TritonInt4Linear(quantized, bias)
        assert (linear.in_features, linear.out_features) == shape[1:]
        assert_product(x, quantized.dequantized(), bias, linear(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_product_is_that_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight, bias, x = inputs(*shape, dtype)
        quantized = Int8Weight.quantize(weight)
        values, scales = packed.quantize_rows(x)
        rounded = values.double() * scales.double()[:, None]
        assert_product(rounded, quantized.dequantized(), bias, TritonInt8Linear(quantized, bias)(x))


def test_rows_of_a_wider_tensor_and_leading_dims() -> None:
    weight, _, x = inputs(6, 300, 24, torch.float32)
    x, weight = x[:, 20:148].unflatten(0, (2, 3)), weight[:, :128]
    for quantized, linear in (
        (Int4Weight.quantize(weight, 64), TritonInt4Linear),
        (Int8Weight.quantize(weight), TritonInt8Linear),
    ):
        got = linear(quantized)(x)
        assert got.shape == (2, 3, 24)
        assert torch.equal(got.flatten(0, 1), linear(quantized)(x.reshape(6, 128)))


def test_rounding_of_activations_is_to_nearest_even_and_a_zero_row_stays_zero() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.4999], [0.0] * 5, [1e-30, -2e-30, 0, 0, 0]])
    x = torch.cat((x, torch.tensor([[1e-44], [1e-40], [2e-38], [1.4e-36]]) * torch.ones(5)))
    values, scales = triton_quantized.quantize_rows(x)
    want_values, want_scales = packed.quantize_rows(x)
    assert values[0].tolist() == [127, 0, 2, -2, 0]
    assert torch.equal(values, want_values)
    assert torch.equal(scales, want_scales)


def test_int4_error_is_at_most_half_a_step_and_zero_is_exact() -> None:
    weight, _, _ = inputs(1, 256, 40, torch.float32)
    weight[3, 7], weight[5] = 0.0, weight[5].abs() + 1.0  # a row far from zero
    quantized = Int4Weight.quantize(weight, 64)
    expanded = quantized.dequantized()
    step = quantized.scales.repeat_interleave(64, dim=1)
    assert ((expanded - weight).abs() <= 0.5001 * step).all()
    assert expanded[3, 7] == 0.0
    assert quantized.values.shape == (40, 128)


@pytest.mark.parametrize(("in_features", "group_size"), [(128, 48), (100, 32)])
def test_groups_that_do_not_fit_are_refused(in_features: int, group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"groups of {group_size}"):
        Int4Weight.quantize(torch.ones(2, in_features), group_size)
