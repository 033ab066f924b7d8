"""DeepSeek-V2 and V3/R1: multi-head latent attention, grouped expert choice, shared experts.

Source: arXiv 2405.04434 (V2), 2412.19437 (V3). V3 scores experts with a sigmoid and chooses with a
learned bias that does not enter the weights ("noaux_tc"); V2 with a softmax.
"""

from __future__ import annotations

import math
from typing import Any

from mxn.errors import UnsupportedError
from mxn.models.families import Family
from mxn.models.families.config import activation, common, mlp, rope
from mxn.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlaSpec,
    MoeSpec,
    RouterSpec,
)


def _refuse_other(config: Any, **known: tuple[Any, ...]) -> None:
    """Raise UnsupportedError for a field whose value is not among those the spec covers."""
    for name, values in known.items():
        value = getattr(config, name, None)
        if value is not None and value not in values:
            raise UnsupportedError(
                f"{config.model_type} with {name} {value!r}; known: {', '.join(map(repr, values))}"
            )


def mla_attention(config: Any, *, is_interleaved: bool) -> AttentionSpec:
    """Return latent attention; YaRN's attention temperature enters the scale."""
    query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    scale = query_dim**-0.5
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default" and parameters.get("mscale_all_dim"):
        factor = parameters["factor"]
        if factor > 1:
            scale *= (0.1 * parameters["mscale_all_dim"] * math.log(factor) + 1.0) ** 2
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=query_dim,
        scale=scale,
        rope=rope(config, dim=config.qk_rope_head_dim, is_interleaved=is_interleaved),
        mla=MlaSpec(
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
        ),
    )


def _layers(config: Any, attention: AttentionSpec, router: RouterSpec) -> tuple[LayerSpec, ...]:
    shared = config.n_shared_experts
    moe = MoeSpec(
        router=router,
        intermediate=config.moe_intermediate_size,
        activation=activation(config.hidden_act),
        shared=mlp(config, config.moe_intermediate_size * shared) if shared else None,
    )
    return tuple(
        LayerSpec(
            attention=attention, ffn=moe if i >= config.first_k_dense_replace else mlp(config)
        )
        for i in range(config.num_hidden_layers)
    )


def deepseek_v2(config: Any) -> DecoderSpec:
    _refuse_other(
        config,
        topk_method=("greedy", "group_limited_greedy"),
        scoring_func=("softmax",),
        moe_layer_freq=(1,),
        norm_topk_prob=(False,),  # transformers ignores it, the code of the checkpoints does not
    )
    is_grouped = config.topk_method == "group_limited_greedy"
    router = RouterSpec(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
        num_groups=config.n_group if is_grouped else 1,
        top_groups=config.topk_group if is_grouped else 1,
    )
    layers = _layers(config, mla_attention(config, is_interleaved=True), router)
    return DecoderSpec(family="deepseek_v2", layers=layers, **common(config))


def deepseek_v3(config: Any) -> DecoderSpec:
    _refuse_other(config, topk_method=("noaux_tc",), scoring_func=("sigmoid",), moe_layer_freq=(1,))
    router = RouterSpec(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        scoring="sigmoid",
        normalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        num_groups=config.n_group or 1,
        top_groups=config.topk_group or 1,
        group_score="top2_sum",
    )
    attention = mla_attention(config, is_interleaved=getattr(config, "rope_interleave", True))
    return DecoderSpec(
        family="deepseek_v3",
        layers=_layers(config, attention, router),
        num_mtp_layers=getattr(config, "num_nextn_predict_layers", 0) or 0,
        **common(config),
    )


FAMILIES = (
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",), deepseek_v2),
    Family("deepseek_v3", ("DeepseekV3ForCausalLM",), deepseek_v3),
)
