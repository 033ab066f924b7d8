"""Tiny random checkpoints of any decoder that transformers knows, made without knowing the model.

A config's numbers are shrunk by the names that transformers' configs share; `OVERRIDES` holds what
that cannot guess. Start at `build`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 256
NUM_LAYERS = 4


def _names(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, int] = {
    **_names(VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_names(64, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width"
                 " word_embed_proj_dim input_embedding_size output_embedding_size"
                 " attention_hidden_size mamba_d_ssm"),
    **_names(NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers"
                         " decoder_layers num_encoder_layers num_decoder_layers num_blocks"
                         " num_layers_per_stack"),
    **_names(4, "num_attention_heads n_head n_heads num_heads attention_heads"
                " encoder_attention_heads decoder_attention_heads num_encoder_attention_heads"
                " num_decoder_attention_heads swa_num_attention_heads index_n_heads"
                " linear_num_heads linear_num_key_heads linear_num_value_heads"),
    **_names(96, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dff"
                 " dim_ff ffn_hidden_size intermediate_size_mlp dense_intermediate_size"
                 " feed_forward_size"),
    **_names(32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"
                 " shared_experts_intermediate_size moe_shared_expert_intermediate_size"
                 " hidden_size_per_layer_input router_hidden_size"),
    **_names(16, "head_dim global_head_dim swa_head_dim kv_channels d_head dim_head kv_lora_rank"
                 " qk_nope_head_dim query_pre_attn_scalar index_head_dim linear_head_dim"
                 " linear_key_head_dim linear_value_head_dim mamba_d_state attention_head_dim"
                 " laurel_rank o_lora_rank gated_norm_rank d_rel"),
    **_names(8, "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim"
                " rotary_dim sliding_window sliding_window_size window_size index_topk"
                " keep_window_size"),
    **_names(2, "num_experts_per_tok moe_topk moe_k num_experts_per_token n_group"
                " num_expert_group zero_expert_num num_kv_shared_layers"),
    **_names(1, "topk_group first_k_dense_replace num_dense_layers n_layers_per_attn_res_block"),
    **_names(0, "num_nextn_predict_layers"),
    **_names(256, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"
                  " max_target_positions max_source_positions"),
    "q_lora_rank": 24, "v_head_dim": 12, "qk_head_dim": 24, "local_attention": 16,
    "shared_intermediate_size": 48,
}  # fmt: skip
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What the names cannot tell, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "max_window_layers": 2, "use_sliding_window": True,
    },
    "inkling_text": {"swa_num_key_value_heads": 2},
    "inkling2_text": {"swa_num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def model_types() -> list[str]:
    """Return every model type that has a causal language model in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type_of_config(model_type)]


def type_of_config(model_type: str) -> type:
    return transformers.CONFIG_MAPPING[model_type]


def tiny_config(model_type: str) -> Any:
    """Return a config of a model small enough for a test."""
    cls = type_of_config(model_type)
    fields = _shrink(cls())
    _merge(fields, OVERRIDES.get(model_type, {}))
    return cls(**fields)


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value


def _shrink(default: Any) -> dict[str, Any]:
    """Return constructor arguments: small numbers for the names of `SMALL` that the config has."""
    values = default.to_dict()
    fields: dict[str, Any] = {}
    depth = next(
        (values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if values.get(n)), None
    )
    for name, value in values.items():
        if name in default.sub_configs:
            sub = getattr(default, name)
            if sub is not None:
                fields[name] = _shrink(sub)
        elif name.endswith("_token_id") and isinstance(value, int):
            fields[name] = _TOKEN_IDS.get(name, VOCAB - 3)
        elif name in SMALL and isinstance(value, (int, float)) and not isinstance(value, bool):
            fields[name] = min(SMALL[name], value) if value else value
        elif isinstance(value, list) and depth and len(value) == depth:
            fields[name] = _short_list(value)
    _shrink_heads(values, fields)
    if "is_decoder" in values:
        fields["is_decoder"] = True
    return fields


def _shrink_heads(values: dict[str, Any], fields: dict[str, Any]) -> None:
    """Make key/value heads and head dim fit 4 query heads; grouped stays grouped."""
    is_latent = "kv_lora_rank" in values
    if "num_key_value_heads" in values:
        is_grouped = values["num_key_value_heads"] != values.get("num_attention_heads")
        fields["num_key_value_heads"] = 2 if is_grouped and not is_latent else 4
    if "head_dim" in values:
        fields["head_dim"] = SMALL["qk_rope_head_dim" if is_latent else "head_dim"]


def _short_list(values: list[Any]) -> list[Any]:
    """Return a list for `NUM_LAYERS` layers that shows every kind of value of a long one."""
    kinds = list(dict.fromkeys(v if not isinstance(v, list) else tuple(v) for v in values))
    return [kinds[i % len(kinds)] for i in range(NUM_LAYERS)]


def build(model_type: str, *, seed: int = 0) -> torch.nn.Module:
    """Return a random model in float32, eval mode, whose logits depend visibly on every part."""
    torch.manual_seed(seed)
    cls, config = model_class(model_type), tiny_config(model_type)
    if cls.config_class is not type(config):  # the language model of a model with several parts
        config = config.get_text_config(decoder=True)
    config._attn_implementation = "eager"
    model = cls(config).float().eval()
    _randomize(model)
    return model


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Scale weights to keep activations near one: the usual tiny initialisation hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    named = dict(model.named_parameters())
    for name, tensor in named.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:
            tensor.add_(0.1 * noise)
        elif "embed" in name or "wte" in name or "wpe" in name:
            tensor.copy_(0.7 * noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    for name, tensor in model.named_buffers():
        if "bias" in name and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
