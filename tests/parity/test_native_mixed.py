"""Checkpoints that have only some of the matrices of a layer quantized: rows fit each of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxn.chips import find_device
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model
from support import tiny
from support.paged import Session

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

GROUP = 16


def _logits(directory, weights):
    format = formats.parse(weights, "f32")
    loaded = load_model(directory, find_device("cpu"), "float32", format=format, num_threads=1)
    return Session(loaded.model).step({0: list(range(3, 30))})[0], loaded.num_parameters


def _write(case, pattern, plain_dir, quantized_dir):
    """Write `case` twice: with matrices of `pattern` quantized, and with the same numbers plain."""
    tiny.write(case, plain_dir)
    config = json.loads((plain_dir / "config.json").read_text())
    plain = load_file(plain_dir / "model.safetensors")
    quantized, num = dict(plain), 0
    for name, weight in list(plain.items()):
        if not re.search(pattern, name) or weight.dim() != 2:
            continue
        grouped = weight.view(weight.shape[0], -1, GROUP)
        scale = grouped.abs().amax(-1) / 127
        whole = (grouped / scale[..., None]).round().clamp(-127, 127)
        quantized[name] = whole.to(torch.int8).view(weight.shape)
        quantized[f"{name}_scale"] = scale
        plain[name] = (whole * scale[..., None]).view(weight.shape).contiguous()
        num += 1
    assert num
    scheme = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": GROUP,
              "symmetric": True}  # fmt: skip
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }  # fmt: skip
    quantized_dir.mkdir()
    (quantized_dir / "config.json").write_text(json.dumps(config))
    save_file(plain, plain_dir / "model.safetensors", metadata={"format": "pt"})
    save_file(quantized, quantized_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("deepseek_v2-lite", r"kv_a_proj"),
        ("deepseek_v2", r"kv_a_proj"),
        ("deepseek_v2", r"q_a_proj"),
        ("deepseek_v2-lite", r"\.q_proj"),
        ("qwen3_moe", r"experts\.[1-5]\.(gate|up)"),
        ("qwen3_moe", r"experts\.0\.(gate|up)"),
        ("deepseek_v2-lite", r"experts\.[1-7]\.(gate|up)"),
    ],
)
def test_a_layer_of_mixed_groupings_has_the_error_of_its_format(case, pattern, tmp_path):
    _write(case, pattern, tmp_path / "plain", tmp_path / "quantized")
    want, size = _logits(tmp_path / "plain", "f32")
    want = want.clone()
    plain = _logits(tmp_path / "plain", "int8")[0].clone()
    found, found_size = _logits(tmp_path / "quantized", "int8")
    assert (found - want).norm() < 1.5 * (plain - want).norm()
    assert found_size == size
