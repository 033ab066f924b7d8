"""Granite: Llama with multipliers on embeddings, attention, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.llama import llama_like
from mxn.models.spec import DecoderSpec


def spec(config: Any) -> DecoderSpec:
    base = llama_like(config, "granite", scale=config.attention_multiplier)
    return replace(
        base,
        layers=tuple(
            replace(layer, residual_scale=config.residual_multiplier) for layer in base.layers
        ),
        embedding_scale=config.embedding_multiplier,
        logit_scale=1.0 / config.logits_scaling,
    )


FAMILIES = (Family("granite", ("GraniteForCausalLM",), spec),)
