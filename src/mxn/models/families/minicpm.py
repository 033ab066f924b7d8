"""MiniCPM 1/2 (Llama with scaled embeddings, residuals and logits) and MiniCPM3 (with MLA)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import common, mlp
from mxn.models.families.deepseek import mla_attention
from mxn.models.families.llama import llama_like
from mxn.models.spec import DecoderSpec, LayerSpec


def _scaled(spec: DecoderSpec, config: Any) -> DecoderSpec:
    depth = config.scale_depth / math.sqrt(config.num_hidden_layers)
    base = getattr(config, "dim_model_base", None) or config.hidden_size
    return replace(
        spec,
        layers=tuple(replace(layer, residual_scale=depth) for layer in spec.layers),
        embedding_scale=float(config.scale_emb),
        logit_scale=base / config.hidden_size,
    )


def minicpm(config: Any) -> DecoderSpec:
    spec = _scaled(llama_like(config, "minicpm"), config)
    # MiniCPM4.1 attends to chosen blocks beyond this length; up to it, to everything.
    dense = (getattr(config, "sparse_config", None) or {}).get("dense_len")
    return replace(spec, max_positions=min(spec.max_positions, dense or spec.max_positions))


def minicpm3(config: Any) -> DecoderSpec:
    layer = LayerSpec(attention=mla_attention(config, is_interleaved=False), ffn=mlp(config))
    spec = DecoderSpec(
        family="minicpm3", layers=(layer,) * config.num_hidden_layers, **common(config)
    )
    return _scaled(spec, config)


FAMILIES = (
    Family(
        "minicpm",
        ("MiniCPMForCausalLM",),
        minicpm,
        why_not=lambda config_json: "it has experts" if config_json.get("num_experts") else None,
    ),
    Family("minicpm3", ("MiniCPM3ForCausalLM",), minicpm3),
)
