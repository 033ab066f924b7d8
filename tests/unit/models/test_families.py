"""From configs to specs, without weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from mxn.errors import UnsupportedError
from mxn.models.families import decoder_families, find_decoder
from mxn.models.families.config import rope
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


def test_rope_types_that_rewrite_old_keys_are_refused():
    config = transformers.LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(UnsupportedError, match="dynamic"):
        rope(config)


def test_grouped_rows_come_apart_into_queries_keys_and_values():
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=1, scale=1.0, rope=None)
    grouped = torch.tensor([[10.0], [11.0], [100.0], [1000.0], [12.0], [13.0], [101.0], [1001.0]])
    assert ungroup_qkv(grouped, spec)[:, 0].tolist() == [10, 11, 12, 13, 100, 101, 1000, 1001]
