"""A small llama in each quantized format: the same logits as the dequantized model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxn.errors import UnsupportedError
from mxn.kernels.registry import Ops
from mxn.models.checkpoint import Checkpoint
from mxn.models.families import find_decoder
from mxn.models.families.config import load_config
from mxn.models.load import load_model
from mxn.models.weights import WeightReader
from support import packers, tiny
from support.paged import Session

GROUP = 16  # of 48 and 80 columns
LOGIT_TOLERANCE = 1e-4  # float32 sums in another order
PROMPT = list(range(3, 40))


def quantize(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what a module computes with, and its tensors."""
    if kind == "w8a8":
        rounded = packers.round_weight(weight, 8, weight.shape[1], symmetric=True)
        return rounded.weight, packers.int_quantized(rounded, symmetric=True)
    if kind == "w4a16":
        rounded = packers.round_weight(weight, 4, GROUP)
        return rounded.weight, packers.pack_quantized(rounded, 4, symmetric=False)
    if kind == "awq":
        rounded = packers.round_weight(weight, 4, GROUP)
        return rounded.weight, packers.awq(rounded)
    order = None
    if kind == "gptq-actorder":  # modules on the same input share it, q, k, v for example
        generator = torch.Generator().manual_seed(weight.shape[1])
        order = torch.randperm(weight.shape[1], generator=generator)
    rounded = packers.round_weight(weight, 4, GROUP, symmetric=kind == "gptq", order=order)
    return rounded.weight, packers.gptq(rounded, 4)


def config_of(kind: str) -> dict:
    if kind in ("w8a8", "w4a16"):
        weights = {"type": "int", "num_bits": 8 if kind == "w8a8" else 4, "strategy": "group"}
        return {
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "format": "int-quantized" if kind == "w8a8" else "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }  # fmt: skip
    return {"quant_method": kind.split("-")[0], "bits": 4, "group_size": GROUP}


def write(kind: str, folder: Path, case: str = "llama2") -> torch.nn.Module:
    """Save a quantized checkpoint; return the reference with the dequantized weights."""
    reference = tiny.write(case, folder)
    stored = load_file(folder / "model.safetensors")
    weights = dict(reference.named_parameters())
    for name in [key for key in stored if "_proj.weight" in key]:
        weight, parts = quantize(kind, stored.pop(name))
        if name in weights:
            weights[name].data = weight
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        assert f"{module}.weight" not in stored or kind == "w8a8"
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": config_of(kind)}
    path.write_text(json.dumps(config))
    return reference


KINDS = ("gptq", "gptq-asym", "gptq-actorder", "awq", "w8a8", "w4a16")


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_llama_has_the_logits_of_the_dequantized_one(tmp_path, device, kind, caplog):
    reference = write(kind, tmp_path)
    want = reference(torch.tensor([PROMPT])).logits[0]
    with caplog.at_level(logging.WARNING, "mxn.models"):
        loaded = load_model(tmp_path, device, "float32")
    got = Session(loaded.model).step({0: PROMPT})[0]
    assert (got - want).abs().max() / want.abs().max() < LOGIT_TOLERANCE
    assert loaded.num_parameters == sum(p.numel() for p in reference.parameters())
    assert caplog.text == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_reader_hands_out_what_is_quantized_and_nothing_else(tmp_path, device, kind):
    write(kind, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    family = find_decoder(checkpoint.config_json)
    assert family is not None
    spec = family.spec(load_config(tmp_path, checkpoint.config_json))
    ops = Ops.bind(device.torch_device, device.chip, torch.float32)
    reader = WeightReader(spec, family.names, checkpoint, ops)
    matrix = reader.quantized("model.layers.1.mlp.down_proj")
    assert matrix is not None
    assert matrix.shape == (48, 80)
    assert matrix.bits == (8 if kind == "w8a8" else 4)
    assert (matrix.perm is not None) == (kind == "gptq-actorder")
    assert reader.quantized("lm_head") is None
    assert reader.quantized("model.layers.1.input_layernorm") is None


def test_an_older_gptq_export_keeps_its_config_in_a_file_of_its_own(tmp_path, device):
    write("gptq", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format is not None
    assert checkpoint.format.name == "gptq"
    assert load_model(tmp_path, device, "float32").is_native


def test_quantized_weights_of_a_family_without_a_spec_are_refused(tmp_path, device):
    write("gptq", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["StableLmForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"quantized weights \(gptq\)[\s\S]*StableLm"):
        load_model(tmp_path, device, "float32")


def spoil(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another tensor in the place of one, or none."""
    stored = load_file(folder / "model.safetensors")
    stored.pop(name)
    if tensor is not None:
        stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "part", "tensor", "said"),
    [
        ("gptq", "scales", torch.ones(7, 48), "7 groups do not divide 80 columns"),
        ("gptq", "scales", torch.ones(5, 40), "do not belong together"),
        ("gptq", "g_idx", torch.zeros(80, dtype=torch.int32), "does not give each group 16"),
        ("gptq", "g_idx", torch.zeros(40, dtype=torch.int32), "g_idx names 40 columns"),
        ("gptq", "qzeros", None, r"no tensor '.*qzeros'"),
        ("awq", "scales", torch.ones(7, 48), "7 groups do not divide 80 columns"),
        ("awq", "qzeros", torch.zeros(5, 5, dtype=torch.int32), "do not belong together"),
        ("w8a8", "weight_scale", torch.ones(47, 1), "scales or zeros for 48 rows"),
        ("w8a8", "weight_scale", torch.ones(48, 3), "3 groups do not divide 80 columns"),
        ("w8a8", "weight", torch.ones(48, 80, dtype=torch.int16), "only int8 is read"),
        ("w4a16", "weight_shape", torch.tensor([48, 96]), "neither 4 nor 8 bits"),
        ("w4a16", "weight_zero_point", torch.zeros(6, 4, dtype=torch.int32), "do not fit scales"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, device, kind, part, tensor, said):
    write(kind, tmp_path)
    spoil(tmp_path, f"model.layers.1.mlp.down_proj.{part}", tensor)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(tmp_path, device, "float32")
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["gptq", "gptq-asym", "awq", "w8a8", "w4a16"])
def test_native_kernels_read_the_makers_numbers_without_rounding_them_again(kind, tmp_path):
    from mxn.kernels.native import formats, missing_reason
    from mxn.models.native.reader import NativeReader

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    reference = write(kind, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    family = find_decoder(checkpoint.config_json)
    spec = family.spec(load_config(tmp_path, checkpoint.config_json))
    reader = NativeReader(spec, family.names, checkpoint, formats.parse("int8", "f32"))
    layer, attention = reader.layer(0), reference.model.layers[0].self_attn
    packed = layer.attention.qkv
    assert packed.format.bits == (8 if kind == "w8a8" else 4)
    want = torch.cat([getattr(attention, f"{n}_proj").weight for n in "qkv"])
    # Scales and minima are kept as float16: half a unit of 11 bits, of the largest product.
    assert (packed.dequantize() - want).abs().max() < 2**-10 * want.abs().max()
    mlp, ffn = reference.model.layers[0].mlp, layer.ffn
    got = ffn.gate_up.dequantize().view(-1, 2, 16, want.shape[1])
    rows = mlp.gate_proj.weight.shape[0]
    for i, part in enumerate((mlp.gate_proj.weight, mlp.up_proj.weight)):
        found = got[:, i].flatten(0, 1)[:rows]
        assert (found - part).abs().max() < 2**-10 * part.abs().max()


@torch.inference_mode()
def test_biases_of_gate_and_up_stay_beside_the_makers_numbers_and_count_once(tmp_path):
    from mxn.kernels.native import formats, missing_reason
    from mxn.models.native.reader import NativeReader

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    mlp = write("gptq", tmp_path).model.layers[0].mlp
    path, prefix = tmp_path / "model.safetensors", "model.layers.0.mlp."
    rows = mlp.gate_proj.weight.shape[0]
    gate, up = torch.arange(1.0, rows + 1), -torch.arange(1.0, rows + 1)
    biases = {f"{prefix}gate_proj.bias": gate, f"{prefix}up_proj.bias": up}
    save_file(load_file(path) | biases, path, metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    family = find_decoder(checkpoint.config_json)
    spec = family.spec(load_config(tmp_path, checkpoint.config_json))
    reader = NativeReader(spec, family.names, checkpoint, formats.parse("int4", "f32"))
    packed = reader._ffn(spec.layers[0].ffn, "model.layers.0.").gate_up
    halves = packed.dequantize().view(-1, 2, 16, spec.hidden)
    found = packed.bias.view(-1, 2, 16)
    for i, (part, bias) in enumerate(((mlp.gate_proj.weight, gate), (mlp.up_proj.weight, up))):
        assert (halves[:, i].flatten(0, 1)[:rows] - part).abs().max() < 2**-10 * part.abs().max()
        assert torch.equal(found[:, i].flatten()[:rows], bias)
    assert checkpoint.num_parameters == sum(p.numel() for p in mlp.parameters()) + 2 * rows


@torch.inference_mode()
@pytest.mark.parametrize("biased", ["qkv", "k"])
def test_biases_of_attention_are_read_beside_the_makers_numbers(tmp_path, biased):
    """Qwen 2 has them, and its GPTQ and AWQ checkpoints have no tensor named `weight`."""
    from mxn.kernels.native import formats, missing_reason
    from mxn.models.native.reader import NativeReader

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    attention = write("gptq", tmp_path).model.layers[0].self_attn
    path, prefix = tmp_path / "model.safetensors", "model.layers.0.self_attn."
    rows = {name: getattr(attention, f"{name}_proj").weight.shape[0] for name in "qkv"}
    biases = {name: torch.arange(1.0, rows[name] + 1) for name in biased}
    stored = {f"{prefix}{name}_proj.bias": bias for name, bias in biases.items()}
    save_file(load_file(path) | stored, path, metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    family = find_decoder(checkpoint.config_json)
    spec = family.spec(load_config(tmp_path, checkpoint.config_json))
    reader = NativeReader(spec, family.names, checkpoint, formats.parse("int4", "f32"))
    packed = reader._attention(spec.layers[0].attention, "model.layers.0.").qkv
    want = torch.cat([biases.get(name, torch.zeros(rows[name])) for name in "qkv"])
    assert packed.format.bits == 4
    assert torch.equal(packed.bias[: len(want)], want)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_native_kernels_give_the_logits_of_the_dequantized_model(kind, tmp_path):
    from mxn.chips import find_device
    from mxn.kernels.native import formats, missing_reason

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    reference = write(kind, tmp_path)
    model = load_model(
        tmp_path, find_device("cpu"), "float32", format=formats.parse("int8", "f32"), num_threads=1
    ).model
    got = Session(model).step({0: PROMPT})[0]
    want = reference(torch.tensor([PROMPT]), use_cache=False).logits[0]
    error = (got - want).norm() / want.norm()
    assert error < 0.05  # activations of 48 columns in 8 bits; a wrong row or order gives 1
