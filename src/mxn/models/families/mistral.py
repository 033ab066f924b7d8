"""Mistral: Llama with a sliding window in all layers, where the config sets one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.llama import llama_like
from mxn.models.spec import DecoderSpec


def with_window(spec: DecoderSpec, window: int | None) -> DecoderSpec:
    """Return `spec` with the same window in all layers."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, window=window)) for layer in spec.layers
    )
    return replace(spec, layers=layers)


def spec(config: Any) -> DecoderSpec:
    return with_window(llama_like(config, "mistral"), config.sliding_window)


FAMILIES = (Family("mistral", ("MistralForCausalLM",), spec),)
