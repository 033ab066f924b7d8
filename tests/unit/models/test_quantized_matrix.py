"""The neutral matrix and the bit packing, as properties."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.quantized.matrix import QuantizedMatrix
from mxn.models.quantized.packing import unpack_awq, unpack_words
from support import packers

SEEDS = st.integers(0, 2**32 - 1)
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}},
}  # fmt: skip


def integers(seed: int, shape: tuple[int, int], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def matrix(seed: int, rows: int, columns: int, group: int, bits: int = 4) -> QuantizedMatrix:
    groups = columns // group
    return QuantizedMatrix(
        values=integers(seed, (rows, columns), bits).to(torch.uint8),
        bits=bits,
        group=group,
        scales=torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) - 0.5,
        zeros=integers(seed + 1, (rows, groups), bits).to(torch.uint8),
    )


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 41), st.sampled_from([4, 8]))
def test_words_unpack_to_what_was_packed_along_either_dim(seed, rows, columns, bits):
    values = integers(seed, (rows, columns), bits)
    along = unpack_words(packers.words(values, bits, 1), bits, 1)
    down = unpack_words(packers.words(values, bits, 0), bits, 0)
    assert torch.equal(along[:, :columns].long(), values)
    assert torch.equal(down[:rows].long(), values)
    assert along[:, columns:].sum() + down[rows:].sum() == 0


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 6))
def test_awq_words_unpack_to_what_was_packed(seed, rows, num_words):
    values = integers(seed, (8 * num_words, rows), 4)
    rounded = packers.Rounded(
        values, torch.ones(8 * num_words, 1), values[:, :1], torch.zeros(rows, dtype=torch.int64)
    )
    assert torch.equal(unpack_awq(packers.awq(rounded)["qweight"]).long(), values.t())


FORMATS = ("gptq", "gptq_v2", "gptq-actorder", "gptq-8bit", "awq", "pack", "pack-asym", "int")


def packed(kind: str, weight: torch.Tensor, group: int) -> tuple[packers.Rounded, dict, dict]:
    """Return the rounded weight, its tensors and the quantization_config of a format."""
    bits = 8 if kind in ("gptq-8bit", "int") else 4
    is_symmetric = kind in ("pack", "int")
    order = None
    if kind == "gptq-actorder":
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(5))
    rounded = packers.round_weight(weight, bits, group, symmetric=is_symmetric, order=order)
    if kind.startswith("gptq"):
        form = "gptq_v2" if kind == "gptq_v2" else "gptq"
        tensors = packers.gptq(rounded, bits, zero_offset=int(form == "gptq"))
        return rounded, tensors, {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    if kind == "awq":
        return rounded, packers.awq(rounded), {"quant_method": "awq", "bits": 4}
    if kind == "int":
        return rounded, packers.int_quantized(rounded, symmetric=True), COMPRESSED
    tensors = packers.pack_quantized(rounded, bits, symmetric=is_symmetric)
    return rounded, tensors, COMPRESSED


@settings(max_examples=15, deadline=None)
@given(
    SEEDS, st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 5), st.sampled_from([8, 24])
)
def test_every_format_reads_back_the_integers_it_stores(seed, kind, eights, groups, group):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8 * eights, groups * group, generator=generator)
    rounded, tensors, quantization = packed(kind, weight, group)
    with tempfile.TemporaryDirectory() as folder:
        config = {"quantization_config": quantization}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        named = {f"m.{key}": value for key, value in tensors.items()}
        save_file(named, Path(folder) / "model.safetensors")
        got = Checkpoint(Path(folder)).quantized("m")
    assert got is not None
    assert got.group == group
    order = torch.arange(weight.shape[1]) if got.perm is None else got.perm
    assert torch.equal(got.values.long(), rounded.values[:, order])
    assert torch.equal(got.zeros.long(), rounded.zeros)
    assert torch.equal(got.dequantize(), rounded.weight)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_joining_mixed_groups_and_bits_changes_no_number(seed, first_rows, second_rows):
    first = matrix(seed, first_rows, 48, 16, bits=4)
    second = matrix(seed + 7, second_rows, 48, 24, bits=8)
    both = QuantizedMatrix.cat([first, second])
    assert (both.group, both.bits, both.shape) == (8, 8, (first_rows + second_rows, 48))
    want = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(both.dequantize(), want)


def test_a_float_zero_makes_all_joined_zeros_floats():
    first, second = matrix(0, 3, 8, 4), matrix(1, 2, 8, 4)
    floats = QuantizedMatrix(
        values=second.values, bits=4, group=4, scales=second.scales, zeros=second.zeros + 0.25
    )
    both = QuantizedMatrix.cat([first, floats])
    assert both.zeros.dtype == torch.float32
    assert torch.equal(both.dequantize(), torch.cat([first.dequantize(), floats.dequantize()]))


def test_rows_pick_scales_and_zeros_too():
    whole, index = matrix(3, 6, 8, 4), torch.tensor([4, 0, 0])
    assert torch.equal(whole.rows(index).dequantize(), whole.dequantize()[index])


def test_matrices_in_different_column_orders_are_not_joined():
    part = matrix(0, 2, 8, 4)
    other = QuantizedMatrix(
        values=part.values, bits=4, group=4, scales=part.scales, zeros=part.zeros,
        perm=torch.arange(8).flip(0),
    )  # fmt: skip
    assert not QuantizedMatrix.can_cat([part, other])
    with pytest.raises(UnsupportedError, match="act-order"):
        QuantizedMatrix.cat([part, other])
    with pytest.raises(UnsupportedError, match=r"\[8, 12\] columns"):
        QuantizedMatrix.cat([part, matrix(0, 2, 12, 4)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "3 bits"),
        ({"group": 5}, "groups of 5 do not divide 8"),
        ({"scales": torch.ones(2, 3)}, r"scales are \[2, 3\], not \[2, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, said):
    fields = {
        "values": torch.zeros(2, 8, dtype=torch.uint8), "bits": 4, "group": 4,
        "scales": torch.ones(2, 2), "zeros": torch.ones(2, 2),
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match=said):
        QuantizedMatrix(**(fields | changes))
