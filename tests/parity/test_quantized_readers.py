"""Readers of quantized checkpoints against weights that other projects' own code packed.

The golden files come from tools/make_quantized_golden.py; each names its origin.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mxn.models.checkpoint import Checkpoint
from mxn.models.quantized.gguf_blocks import to_matrix
from mxn.models.quantized.gguf_file import TYPES

GOLDEN = Path(__file__).parent / "golden" / "quantized"
# Both sides compute in float32, in another order: a few roundings of the largest term.
ROUNDING = 4 * torch.finfo(torch.float32).eps


def cases(file: str) -> list[str]:
    with safe_open(GOLDEN / f"{file}.safetensors", framework="pt") as opened:
        return sorted({name.split(".")[0] for name in opened.keys()})  # noqa: SIM118


def golden(file: str, case: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN / f"{file}.safetensors", framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
        return {name.removeprefix(f"{case}."): opened.get_tensor(name) for name in names}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **quantization) -> Checkpoint:
    """Write a module "m" and return the checkpoint."""
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"m.{key}": value for key, value in tensors.items() if key != "want"}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def assert_same(want: torch.Tensor, got: torch.Tensor, tolerance: float = ROUNDING) -> None:
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"largest error {error:.2e} of the largest weight"


@pytest.mark.parametrize("kind", cases("gguf_blocks"))
def test_gguf_blocks_are_what_the_gguf_package_reads(kind):
    parts = golden("gguf_blocks", kind)
    size = next(block for block in TYPES.values() if block.name == kind).num_bytes
    matrix = to_matrix(kind, parts["raw"].view(parts["raw"].shape[0], -1, size))
    assert_same(parts["want"], matrix.dequantize())
    assert int(matrix.values.max()) < 2**matrix.bits


@pytest.mark.parametrize("case", cases("compressed_tensors"))
def test_compressed_tensors_modules_are_what_its_package_decompresses(tmp_path, case):
    parts = golden("compressed_tensors", case)
    loaded = checkpoint(tmp_path, parts, **compressed_config(case))
    matrix = loaded.quantized("m")
    assert matrix is not None
    assert matrix.bits == (4 if "w4" in case else 8)
    assert (matrix.perm is not None) == ("actorder" in case)
    assert_same(parts["want"], matrix.dequantize())
    assert loaded.unread == []


def compressed_config(case: str) -> dict:
    layout = "int-quantized" if case in ("w8a8", "w8a8-asym", "w8-tensor") else "pack-quantized"
    weights = {"type": "int", "num_bits": 4 if "w4" in case else 8, "strategy": "channel"}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


@pytest.mark.parametrize("case", cases("gptq"))
def test_gptq_modules_are_what_autogptq_computes_with(tmp_path, case):
    parts = golden("gptq", case)
    bits = 8 if "8bit" in case else 4
    matrix = checkpoint(tmp_path, parts, quant_method="gptq", bits=bits).quantized("m")
    assert matrix is not None
    assert matrix.bits == bits
    assert (matrix.perm is not None) == ("actorder" in case)
    groups = {"asym-channel": 128, "asym-g128": 128, "asym-g64": 64}
    assert matrix.group == groups.get(case, 32)
    assert_same(parts["want"], matrix.dequantize())


# Version 2 cannot store a zero of 16.
@pytest.mark.parametrize("case", [case for case in cases("gptq") if case != "zero16-g32"])
def test_gptq_v2_stores_the_zero_itself(tmp_path, case):
    """GPTQModel turns version 1 into 2 by adding one to each packed zero."""
    parts = golden("gptq", case)
    bits = 8 if "8bit" in case else 4
    ones = sum(1 << shift for shift in range(0, 32, bits))
    parts["qzeros"] = (parts["qzeros"].long() + ones).to(torch.int32)
    loaded = checkpoint(
        tmp_path, parts, quant_method="gptq", bits=bits, checkpoint_format="gptq_v2"
    )
    assert_same(parts["want"], loaded.read("m.weight"))


@pytest.mark.parametrize("case", cases("awq"))
def test_awq_modules_are_what_autoawq_dequantizes(tmp_path, case):
    parts = golden("awq", case)
    loaded = checkpoint(tmp_path, parts, quant_method="awq", bits=4, version="gemm")
    matrix = loaded.quantized("m")
    assert matrix is not None
    assert matrix.group == int(case.removeprefix("g"))
    assert_same(parts["want"], matrix.dequantize())
    assert loaded.unread == []
