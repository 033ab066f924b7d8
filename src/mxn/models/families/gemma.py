"""Gemma 1, 2 and 3 (text): norm weights stored minus one, scaled embeddings, soft-caps, windows."""

from __future__ import annotations

from typing import Any

from mxn.models.families import Family
from mxn.models.families.config import attention, common, layer_windows, mlp, rope
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec, LayerSpec


def _spec(config: Any, family: str, layers: tuple[LayerSpec, ...]) -> DecoderSpec:
    return DecoderSpec(
        family=family,
        layers=layers,
        is_norm_offset=True,
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        **common(config),
    )


def gemma(config: Any) -> DecoderSpec:
    layer = LayerSpec(attention=attention(config, rope(config)), ffn=mlp(config))
    return _spec(config, "gemma", (layer,) * config.num_hidden_layers)


def gemma2(config: Any) -> DecoderSpec:
    rope_spec = rope(config)
    layers = tuple(
        LayerSpec(
            attention=attention(
                config,
                rope_spec,
                window=window,
                scale=config.query_pre_attn_scalar**-0.5,
                softcap=config.attn_logit_softcapping,
            ),
            ffn=mlp(config),
            has_post_norm=True,
        )
        for window in layer_windows(config)
    )
    return _spec(config, "gemma2", layers)


def gemma3(config: Any) -> DecoderSpec:
    ropes = {
        kind: rope(config, parameters=parameters)
        for kind, parameters in config.rope_parameters.items()
    }
    layers = tuple(
        LayerSpec(
            attention=attention(
                config,
                ropes[kind],
                window=window,
                scale=config.query_pre_attn_scalar**-0.5,
                qk_norm="head",
            ),
            ffn=mlp(config),
            has_post_norm=True,
        )
        for kind, window in zip(config.layer_types, layer_windows(config), strict=True)
    )
    return _spec(config, "gemma3", layers)


def _why_not(config_json: dict[str, Any]) -> str | None:
    if config_json.get("use_bidirectional_attention"):
        return "use_bidirectional_attention: its tokens see what follows them"
    return None


_SANDWICH = Names(
    post_attn_norm="post_attention_layernorm",
    pre_ffn_norm="pre_feedforward_layernorm",
    post_ffn_norm="post_feedforward_layernorm",
)

FAMILIES = (
    Family("gemma", ("GemmaForCausalLM",), gemma, why_not=_why_not),
    Family("gemma2", ("Gemma2ForCausalLM",), gemma2, _SANDWICH, _why_not),
    Family("gemma3", ("Gemma3ForCausalLM",), gemma3, _SANDWICH, _why_not),
)
