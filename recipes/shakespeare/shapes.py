"""The two shapes as configurations of `transformers`. Sizes fit a CPU and a megabyte of text."""

from __future__ import annotations

from typing import Any

SHAPES = ("llama", "dsv3")
CONTEXT_TOKENS = 1024


def make_config(shape: str, vocab_size: int) -> Any:
    """Return a LlamaConfig or DeepseekV3Config. Raises: ValueError for another shape."""
    if shape == "llama":
        return _llama(vocab_size)
    if shape == "dsv3":
        return _deepseek_v3(vocab_size)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def _common(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def _llama(vocab_size: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        **_common(vocab_size),
    )


def _deepseek_v3(vocab_size: int) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        # transformers knows only this routing; other engines ask for it by these names.
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        rope_interleave=True,
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
        architectures=["DeepseekV3ForCausalLM"],
        **_common(vocab_size),
    )
