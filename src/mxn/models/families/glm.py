"""GLM-4 in its two Hugging Face forms: `glm` (pre-norm) and `glm4` (norms on both sides)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import attention, common, mlp, rope
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec, LayerSpec


def glm(config: Any) -> DecoderSpec:
    layer = LayerSpec(
        attention=attention(config, rope(config, is_interleaved=True)), ffn=mlp(config)
    )
    return DecoderSpec(family="glm", layers=(layer,) * config.num_hidden_layers, **common(config))


def glm4(config: Any) -> DecoderSpec:
    spec = glm(config)
    layers = tuple(replace(layer, has_post_norm=True) for layer in spec.layers)
    return replace(spec, family="glm4", layers=layers)


_FUSED = Names(gate_up=("mlp.gate_up_proj",))

FAMILIES = (
    Family("glm", ("GlmForCausalLM",), glm, _FUSED),
    Family(
        "glm4",
        ("Glm4ForCausalLM",),
        glm4,
        replace(
            _FUSED, post_attn_norm="post_self_attn_layernorm", post_ffn_norm="post_mlp_layernorm"
        ),
    ),
)
