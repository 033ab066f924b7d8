"""OLMo 2: norms behind attention and MLP instead of before, query/key norm over all heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.llama import llama_like
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec


def spec(config: Any) -> DecoderSpec:
    base = llama_like(config, "olmo2", qk_norm="full")
    layers = tuple(replace(layer, has_pre_norm=False, has_post_norm=True) for layer in base.layers)
    return replace(base, layers=layers)


FAMILIES = (
    Family(
        "olmo2",
        ("Olmo2ForCausalLM",),
        spec,
        Names(
            post_attn_norm="post_attention_layernorm", post_ffn_norm="post_feedforward_layernorm"
        ),
    ),
)
