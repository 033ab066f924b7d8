"""Small random checkpoints, one for each native family, made by `transformers` itself.

Each entry builds the reference; `write` saves it as a Hugging Face directory. Families whose code
is not part of transformers are made from one with the same mathematics, with renamed weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB = 131
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    "initializer_range": 0.15,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# As the published InternLM 2.5 and 3 have it: beyond max_position_embeddings only.
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_MLA = {
    "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "num_key_value_heads": 4,
}  # fmt: skip
_DEEPSEEK = {
    **_MLA, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6, "factor": 1.0,
}  # fmt: skip


def _hf(config_name: str, **changes: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        config = getattr(transformers, config_name)(**{**_BASE, **changes})
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return build


CASES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama2": _hf("LlamaConfig", num_key_value_heads=4),
    "llama3": _hf("LlamaConfig", rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "llama-bias": _hf("LlamaConfig", attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": _hf("MistralConfig", sliding_window=7),
    "mixtral": _hf("MixtralConfig", num_local_experts=5, sliding_window=None),
    "qwen2": _hf("Qwen2Config", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2_moe": _hf("Qwen2MoeConfig", **_MOE, shared_expert_intermediate_size=40),
    "qwen3": _hf("Qwen3Config", head_dim=16),
    "qwen3_moe": _hf(
        "Qwen3MoeConfig", **_MOE, head_dim=16, mlp_only_layers=[1], use_sliding_window=True,
        sliding_window=7,
    ),
    "deepseek_v2": _hf("DeepseekV2Config", **_DEEPSEEK, topk_method="group_limited_greedy"),
    "deepseek_v2-lite": _hf(
        "DeepseekV2Config",
        **{**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
        rope_parameters=_YARN,
    ),
    "deepseek_v3": _hf("DeepseekV3Config", **_DEEPSEEK, rope_parameters=_YARN),
    "glm": _hf("GlmConfig", head_dim=12, attention_bias=True),
    "glm4": _hf("Glm4Config", head_dim=12, attention_bias=True),
    "phi3": _hf("Phi3Config", sliding_window=8),
    "phi3-longrope": _hf("Phi3Config", rope_parameters=_LONGROPE, sliding_window=None),
    "gemma": _hf("GemmaConfig", head_dim=16, tie_word_embeddings=True),
    # Soft-caps low enough to matter; an activation under the name that its code does not read.
    "gemma2": _hf(
        "Gemma2Config", head_dim=16, query_pre_attn_scalar=24, sliding_window=6,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0, hidden_act="relu",
    ),
    "gemma3": _hf(
        "Gemma3TextConfig", head_dim=16, sliding_window=6, num_hidden_layers=7,
        tie_word_embeddings=True,
    ),
    "olmo2": _hf("Olmo2Config"),
    "granite": _hf(
        "GraniteConfig", embedding_multiplier=6.0, residual_multiplier=0.4, logits_scaling=3.0,
        attention_multiplier=0.2,
    ),
    "minicpm3": _hf(
        "MiniCPM3Config", **_MLA, scale_emb=6, scale_depth=1.4, dim_model_base=24,
        tie_word_embeddings=True,
    ),
    "internlm": _hf("LlamaConfig", attention_bias=True),
    "internlm2": _hf("LlamaConfig", rope_parameters=_DYNAMIC),
    "minicpm": _hf(
        "GraniteConfig", embedding_multiplier=6.0, residual_multiplier=1.4 / 3**0.5,
        logits_scaling=2.0, attention_multiplier=12**-0.5,
    ),
}  # fmt: skip


def write(case: str, directory: Path, *, seed: int = 0) -> torch.nn.Module:
    """Save the checkpoint of `case` and return the reference model, in eval mode."""
    torch.manual_seed(seed)
    model = CASES[case]().eval()
    _randomize(model)
    model.save_pretrained(directory)
    if case in _FOREIGN:
        _FOREIGN[case](directory)
    return model


def _randomize(model: torch.nn.Module) -> None:
    """Give biases, norms and router biases values too: their defaults hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            if "inv_freq" in name or not tensor.is_floating_point():
                continue
            if tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif "gate.weight" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _rewrite(
    directory: Path,
    architecture: str,
    model_type: str,
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    **config: Any,
) -> None:
    from safetensors.torch import load_file

    weights = load_file(directory / "model.safetensors")
    save_file(rename(weights), directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    fields = {**json.loads(path.read_text()), **config}
    fields |= {"architectures": [architecture], "model_type": model_type}
    path.write_text(json.dumps(fields))


def _internlm2_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    renames = (
        ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
    )  # fmt: skip
    for name, tensor in weights.items():
        if "q_proj" in name:
            q = tensor.view(2, 2, 12, 48)
            k, v = (
                weights[name.replace("q_proj", p)].view(2, 1, 12, 48) for p in ("k_proj", "v_proj")
            )
            new = name.replace("self_attn.q_proj", "attention.wqkv")
            out[new] = torch.cat((q, k, v), 1).reshape(-1, 48).contiguous()
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in renames:
                name = name.replace(old, new)
            out[name] = tensor
    return out


_FOREIGN: dict[str, Callable[[Path], None]] = {
    "internlm": lambda d: _rewrite(d, "InternLM3ForCausalLM", "internlm3", dict),
    "internlm2": lambda d: _rewrite(d, "InternLM2ForCausalLM", "internlm2", _internlm2_names),
    "minicpm": lambda d: _rewrite(
        d, "MiniCPMForCausalLM", "minicpm", dict, scale_emb=6.0, scale_depth=1.4, dim_model_base=24
    ),
}
