"""Mixtral: Mistral with experts; the chosen experts' weights sum to one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import activation
from mxn.models.families.llama import llama_like
from mxn.models.families.mistral import with_window
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec, MoeSpec, RouterSpec


def spec(config: Any) -> DecoderSpec:
    moe = MoeSpec(
        router=RouterSpec(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            normalize=True,
        ),
        intermediate=config.intermediate_size,
        activation=activation(config.hidden_act),
    )
    dense = with_window(llama_like(config, "mixtral"), config.sliding_window)
    return replace(dense, layers=tuple(replace(layer, ffn=moe) for layer in dense.layers))


FAMILIES = (
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        spec,
        Names(
            router="block_sparse_moe.gate",
            expert_gate_up=("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
            expert_down="block_sparse_moe.experts.{e}.w2",
        ),
    ),
)
