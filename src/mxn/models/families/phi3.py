"""Phi-3 and Phi-4: fused projections, partial rotary dims, LongRoPE."""

from __future__ import annotations

from typing import Any

from mxn.models.families import Family
from mxn.models.families.llama import llama_like
from mxn.models.families.mistral import with_window
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec


def spec(config: Any) -> DecoderSpec:
    return with_window(llama_like(config, "phi3"), config.sliding_window)


FAMILIES = (
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        spec,
        Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    ),
)
