"""Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import activation, mlp
from mxn.models.families.llama import llama_like
from mxn.models.families.mistral import with_window
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec, MoeSpec, RouterSpec


def is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer has experts: each `decoder_sparse_step`-th that is not listed as dense."""
    return (
        layer not in (config.mlp_only_layers or [])
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


def with_experts(spec: DecoderSpec, config: Any, moe: MoeSpec) -> DecoderSpec:
    layers = tuple(
        replace(layer, ffn=moe) if is_sparse(config, i) else layer
        for i, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def experts(config: Any) -> MoeSpec:
    return MoeSpec(
        router=RouterSpec(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
        ),
        intermediate=config.moe_intermediate_size,
        activation=activation(config.hidden_act),
    )


def qwen2_moe(config: Any) -> DecoderSpec:
    moe = replace(
        experts(config),
        shared=mlp(config, config.shared_expert_intermediate_size),
        has_shared_gate=True,
    )
    return with_experts(llama_like(config, "qwen2_moe"), config, moe)


def qwen3_moe(config: Any) -> DecoderSpec:
    dense = llama_like(config, "qwen3_moe", qk_norm="head")
    # Unlike Qwen2 it knows no layer types: a window, where one is set, holds in all layers.
    return with_experts(with_window(dense, config.sliding_window), config, experts(config))


FAMILIES = (
    Family("qwen2", ("Qwen2ForCausalLM",), lambda config: llama_like(config, "qwen2")),
    Family(
        "qwen2_moe",
        ("Qwen2MoeForCausalLM",),
        qwen2_moe,
        Names(
            shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            shared_down="mlp.shared_expert.down_proj",
        ),
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        lambda config: llama_like(config, "qwen3", qk_norm="head"),
    ),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), qwen3_moe),
)
