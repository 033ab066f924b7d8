"""Checkpoints with random weights in the shapes of real models, for benchmarks without downloads.

The recipe: the published config, weights from a normal distribution with the config's
`initializer_range`, norms at one, seed 0, stored as bfloat16; a word-level tokenizer with a word
for each token id. Speed does not depend on what the weights say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxn import env
from mxn.errors import NotFoundError

# The fields of each published config.json that decide the shape.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02,
        "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16",
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02,
        "bos_token_id": 128000, "eos_token_id": 128009, "dtype": "bfloat16",
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096,
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    },
}  # fmt: skip


def ensure_checkpoint(shape: str, on_progress: Callable[[str], None]) -> Path:
    """Return the directory of a random checkpoint, made at the first call in MXN_HOME/bench."""
    if shape not in SHAPES:
        raise NotFoundError(f"no benchmark shape {shape!r}; there are {', '.join(SHAPES)}")
    directory = env.home() / "bench" / f"{shape}-random"
    if not (directory / "complete").is_file():
        on_progress(f"making a random checkpoint in the shape of {shape} ({directory})")
        directory.mkdir(parents=True, exist_ok=True)
        _write(SHAPES[shape], directory)
        (directory / "complete").touch()
    return directory


def _write(config: dict[str, Any], directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.bfloat16
    )
    model.save_pretrained(directory)
    _write_tokenizer(config, directory)


def _write_tokenizer(config: dict[str, Any], directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))
