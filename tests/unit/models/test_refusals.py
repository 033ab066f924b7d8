"""What must not load and give wrong logits: foreign quantization, unknown weights, odd configs."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.families.deepseek import deepseek_v2, deepseek_v3
from mxn.models.load import load_model, refuse_quantization
from mxn.models.quantized import find_format
from support import tiny


def edit(directory, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_tensors(directory, **changes: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("gptq", {"bits": 3}),
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}),
        ("awq", {"bits": 4, "version": "gemv"}),
        ("awq", {"bits": 4, "zero_point": False}),
        ("compressed-tensors", {"format": "float-quantized"}),
        ("bitsandbytes", {}),
        ("mxfp4", {}),
        ("fbgemm_fp8", {}),
        ("modelopt", {}),
    ],
)
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_weights_of_other_quantizations_are_refused_before_anything_is_read(
    tmp_path, device, method, fields, place
):
    fields = {"quantization_config": {"quant_method": method, **fields}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= fields if place == "top" else {"text_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    read = []
    with pytest.raises(UnsupportedError, match=rf"quantized \({method}\)"):
        load_model(tmp_path, device, "float32", on_progress=lambda *n: read.append(n))
    assert read == []


@pytest.mark.parametrize(
    ("layout", "name"), [("auto_round:auto_gptq", "gptq"), ("auto_round:auto_awq", "awq")]
)
def test_what_auto_round_packed_is_read_in_the_layout_that_it_names(layout, name):
    config = {"quant_method": "auto-round", "bits": 4, "packing_format": layout}
    form = find_format({"quantization_config": config})
    assert form is not None
    assert form.name == name
    with pytest.raises(UnsupportedError, match=r"quantized \(auto-round\)"):
        find_format({"quantization_config": config | {"packing_format": "auto_round:fp8"}})


def test_fp8_of_another_format_is_refused_and_blocks_are_not():
    refuse_quantization({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}})
    with pytest.raises(UnsupportedError, match="e5m2"):
        refuse_quantization({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}})


def test_integer_weights_are_refused_even_when_the_config_does_not_say_quantized(tmp_path, device):
    tiny.write("llama2", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    with_tensors(tmp_path, **{name: torch.ones(48, 80, dtype=torch.int8)})
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight is torch\.int8"):
        load_model(tmp_path, device, "float32")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_fp8_scale_for_a_whole_weight_is_applied(tmp_path, shape):
    weight = torch.linspace(-300, 300, 200 * 150).view(200, 150).to(torch.float8_e4m3fn)
    scale = torch.full(shape, 0.25)
    save_file({"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(Checkpoint(tmp_path).read("a.weight"), weight.float() * 0.25)


def test_power_of_two_scales_stored_as_e8m0_are_read(tmp_path):
    weight = torch.linspace(-300, 300, 200 * 150).view(200, 150).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0], [4.0, 0.125]]).to(torch.float8_e8m0fnu)
    save_file({"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    got = Checkpoint(tmp_path).read("a.weight")
    assert torch.equal(got[:128, 128:], weight[:128, 128:].float() * 2.0)
    assert torch.equal(got[128:, :128], weight[128:, :128].float() * 4.0)


def test_fp8_scales_that_do_not_fit_the_blocks_are_refused(tmp_path):
    weight = torch.ones(200, 150).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.ones(200, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"is \(200, 1\)[\s\S]*need \(2, 2\)"):
        Checkpoint(tmp_path).read("a.weight")


def test_a_layer_weight_the_family_does_not_know_is_refused(tmp_path, device):
    tiny.write("llama2", tmp_path)
    with_tensors(tmp_path, **{"model.layers.2.self_attn.q_norm.weight": torch.ones(12)})
    with pytest.raises(UnsupportedError, match=r"layers\.2\.self_attn\.q_norm\.weight"):
        load_model(tmp_path, device, "float32")


def test_other_unused_tensors_are_warned_of_and_old_buffers_are_not(tmp_path, device, caplog):
    tiny.write("llama2", tmp_path)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_tensors(tmp_path, **{buffer: torch.ones(6), "vision.weight": torch.ones(3)})
    with caplog.at_level(logging.WARNING, "mxn.models"):
        loaded = load_model(tmp_path, device, "float32")
    assert loaded.unused_tensors == (buffer, "vision.weight")
    assert "1 tensors of the checkpoint are not used: vision.weight" in caplog.text
    assert buffer not in caplog.text


@pytest.mark.parametrize(
    ("spec", "config", "fields"),
    [
        (deepseek_v2, transformers.DeepseekV2Config, {"norm_topk_prob": True}),
        (deepseek_v2, transformers.DeepseekV2Config, {"topk_method": "noaux_tc"}),
        (deepseek_v2, transformers.DeepseekV2Config, {"moe_layer_freq": 2}),
        (deepseek_v3, transformers.DeepseekV3Config, {"scoring_func": "softmax"}),
        (deepseek_v3, transformers.DeepseekV3Config, {"topk_method": "greedy"}),
    ],
)
def test_routing_the_spec_does_not_cover_is_refused(spec, config, fields):
    with pytest.raises(UnsupportedError, match=next(iter(fields))):
        spec(config(**fields))


def test_layer_types_the_spec_does_not_cover_are_refused(tmp_path, device):
    tiny.write("qwen2", tmp_path)
    edit(tmp_path, layer_types=["full_attention", "chunked_attention", "full_attention"])
    with pytest.raises(UnsupportedError, match="chunked_attention"):
        load_model(tmp_path, device, "float32", allow_fallback=False)


def test_a_gemma_that_sees_both_ways_is_not_run_as_a_causal_one(tmp_path, device):
    tiny.write("gemma3", tmp_path)
    edit(tmp_path, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        load_model(tmp_path, device, "float32", allow_fallback=False)


def test_a_bert_that_sees_only_what_precedes_is_not_run_as_an_encoder(tmp_path, device):
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, is_decoder=True,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="is_decoder"):
        load_model(tmp_path, device, "float32")


def test_a_config_transformers_cannot_read_is_a_clear_error(tmp_path, device):
    tiny.write("llama2", tmp_path)
    edit(tmp_path, model_type="nonsense")
    with pytest.raises(UnsupportedError, match=r"model_type 'nonsense'"):
        load_model(tmp_path, device, "float32")


def test_a_whole_file_wins_over_copies_beside_it(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"tok.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint(tmp_path).names == ["a.weight"]


def test_a_missing_weight_is_still_an_error(tmp_path, device):
    tiny.write("llama2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match=r"lm_head\.weight"):
        load_model(tmp_path, device, "float32")
