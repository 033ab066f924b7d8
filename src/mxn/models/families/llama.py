"""Llama 2 and 3.x, and the many checkpoints that use their architecture."""

from __future__ import annotations

from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import attention, common, layer_windows, mlp, rope
from mxn.models.spec import DecoderSpec, LayerSpec


def llama_like(config: Any, family: str, **attention_options: Any) -> DecoderSpec:
    """Return the spec of a pre-norm decoder with grouped-query attention and a gated MLP."""
    rope_spec = rope(config)
    layers = tuple(
        LayerSpec(
            attention=attention(config, rope_spec, window=window, **attention_options),
            ffn=mlp(config),
        )
        for window in layer_windows(config)
    )
    return DecoderSpec(family=family, layers=layers, **common(config))


FAMILIES = (Family("llama", ("LlamaForCausalLM",), lambda config: llama_like(config, "llama")),)
