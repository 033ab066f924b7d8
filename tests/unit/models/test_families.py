"""From configs to specs, without weights."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from mxn.errors import UnsupportedError
from mxn.models.families import decoder_families, find_decoder
from mxn.models.families.config import load_config, rope
from mxn.models.families.deepseek import deepseek_v3
from mxn.models.spec import AttentionSpec, MlpSpec, MoeSpec
from mxn.models.weights import ungroup_qkv


def test_at_least_sixteen_families_are_native_and_no_architecture_has_two():
    families = decoder_families()
    architectures = [name for family in families for name in family.architectures]
    assert len(families) >= 16
    assert len(set(architectures)) == len(architectures)


def test_an_unknown_architecture_has_no_native_family():
    assert find_decoder({"architectures": ["FalconMambaForCausalLM"]}) is None


def test_a_minicpm_with_experts_is_left_to_the_fallback():
    assert find_decoder({"architectures": ["MiniCPMForCausalLM"]})
    assert find_decoder({"architectures": ["MiniCPMForCausalLM"], "num_experts": 8}) is None


def test_the_published_deepseek_v3_shape_stores_576_numbers_per_token_and_layer():
    spec = deepseek_v3(transformers.DeepseekV3Config())
    assert len(spec.layers) == 61
    assert isinstance(spec.layers[2].ffn, MlpSpec)
    assert isinstance(spec.layers[3].ffn, MoeSpec)
    shapes = [layer.attention.kv_shape for layer in spec.layers]
    assert sum(2 * s.num_heads * (s.k_dim + s.v_dim) for s in shapes) == 70_272  # bytes in bf16


def test_a_dynamic_rope_is_plain_within_the_positions_of_the_model():
    plain = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    dynamic = transformers.LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    assert rope(dynamic).inv_freq == pytest.approx(rope(plain).inv_freq, rel=1e-6)


def test_an_unknown_rope_type_is_refused():
    config = transformers.LlamaConfig()
    with pytest.raises(UnsupportedError, match="'spiral' is not one of default, dynamic"):
        rope(config, parameters={"rope_type": "spiral", "rope_theta": 1e4})


# As on the hub, where the code beside the checkpoint supplies what the file leaves out.
_MINICPM_2B = {
    "architectures": ["MiniCPMForCausalLM"], "hidden_act": "silu", "hidden_size": 2304,
    "intermediate_size": 5760, "max_position_embeddings": 4096, "num_attention_heads": 36,
    "num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "vocab_size": 122753, "scale_emb": 12, "dim_model_base": 256,
    "scale_depth": 1.4, "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
}  # fmt: skip


def native_spec(directory, config_json):
    (directory / "config.json").write_text(json.dumps(config_json))
    family = find_decoder(config_json)
    assert family is not None
    return family.spec(load_config(directory, config_json))


def test_a_minicpm_config_without_type_or_tying_gets_the_defaults_of_its_own_code(tmp_path):
    spec = native_spec(tmp_path, _MINICPM_2B)
    assert spec.is_tied
    assert spec.embedding_scale == 12.0
    assert spec.logit_scale == pytest.approx(256 / 2304)


def test_a_minicpm_with_sparse_attention_ends_where_that_begins(tmp_path):
    fields = {"model_type": "minicpm", "sparse_config": {"dense_len": 2048}}
    assert native_spec(tmp_path, _MINICPM_2B | fields).max_positions == 2048


def test_a_kimi_k2_is_read_as_the_deepseek_v3_it_is(tmp_path):
    config_json = transformers.DeepseekV3Config(num_hidden_layers=2).to_dict()
    config_json |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}
    assert native_spec(tmp_path, config_json).family == "deepseek_v3"


def test_grouped_rows_come_apart_into_queries_keys_and_values():
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=1, scale=1.0, rope=None)
    grouped = torch.tensor([[10.0], [11.0], [100.0], [1000.0], [12.0], [13.0], [101.0], [1001.0]])
    assert ungroup_qkv(grouped, spec)[:, 0].tolist() == [10, 11, 12, 13, 100, 101, 1000, 1001]
