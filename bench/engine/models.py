"""Checkpoints with random weights in the shapes of real models, in Hugging Face's layout.

Knows shapes and files; knows no engine. Weights are normal with deviation 0.02, norms are one, the
seed belongs to the tensor's name; speed does not depend on what the weights say, and the logits of
such a model are far enough from constant to compare formats with. The tokenizer is a byte-level BPE
whose merges fill the vocabulary, so that loading it costs what a real one costs and it needs no
network. Start at `ensure`.

    python bench/engine/models.py --cache FOLDER qwen3-0.6b llama-3.2-1b
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEVIATION = 0.02
SHARD_BYTES = 2**30

_ROPE_LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_ROPE_YARN = {
    "rope_type": "yarn", "type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
}  # fmt: skip

# The fields of the published config.json files that decide the shape. The two last ones are cut to
# fit: layers as published, but fewer layers, experts and words, so that the experts still dominate.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": _ROPE_LLAMA3,
        "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128009,
    },
    "qwen3-moe-cut": {  # Qwen3-30B-A3B with 6 of 48 layers, 32 of 128 experts
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32768,
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 6,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "bos_token_id": 32766, "eos_token_id": 32767,
    },
    # DeepSeek-V2-Lite with 4 of 27 layers, 32 of 64 experts, and the low-rank queries of V2:
    # llama.cpp knows a model without them by its 27 layers only.
    "deepseek-v2-lite-cut": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 10944,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408,
        "n_routed_experts": 32, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_scaling": _ROPE_YARN,
        "tie_word_embeddings": False, "bos_token_id": 32766, "eos_token_id": 32767,
    },
    "tiny": {  # for tests of the benchmark itself
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096,
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "bos_token_id": 4094, "eos_token_id": 4095,
    },
}  # fmt: skip
_COMMON = {
    "hidden_act": "silu", "initializer_range": DEVIATION, "attention_bias": False,
    "attention_dropout": 0.0, "dtype": "bfloat16", "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip

Tensor = tuple[str, tuple[int, ...]]


def ensure(name: str, cache: Path) -> Path:
    """Return the folder of a random checkpoint, written again when its shape changed.

    Raises: SystemExit for a shape that is not in `SHAPES`.
    """
    if name not in SHAPES:
        raise SystemExit(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    folder = cache / name
    config = SHAPES[name] | _COMMON
    text = json.dumps(config, indent=2) + "\n"
    is_there = (folder / "complete").is_file()
    if not is_there or (folder / "config.json").read_text() != text:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
        ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        (folder / "generation_config.json").write_text(json.dumps(ids) + "\n")
        write_tokenizer(config, folder)
        write_weights(list(tensors(config)), folder)
        (folder / "complete").touch()
    return folder


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Yield name and shape of every tensor of a checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "post_attention_layernorm.weight", (hidden,)
        attention = _mla(config) if "kv_lora_rank" in config else _gqa(config)
        yield from ((f"{at}self_attn.{name}.weight", shape) for name, shape in attention)
        yield from ((f"{at}mlp.{name}.weight", shape) for name, shape in _mlp(config, layer))
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _gqa(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "q_proj", (heads * dim, hidden)
    yield "k_proj", (kv_heads * dim, hidden)
    yield "v_proj", (kv_heads * dim, hidden)
    yield "o_proj", (hidden, heads * dim)
    if config["model_type"].startswith("qwen3"):
        yield "q_norm", (dim,)
        yield "k_norm", (dim,)


def _mla(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, heads, rank = (
        config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    )  # fmt: skip
    nope, rope, value = (
        config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    )  # fmt: skip
    if query_rank := config["q_lora_rank"]:
        yield "q_a_proj", (query_rank, hidden)
        yield "q_a_layernorm", (query_rank,)
        yield "q_b_proj", (heads * (nope + rope), query_rank)
    else:
        yield "q_proj", (heads * (nope + rope), hidden)
    yield "kv_a_proj_with_mqa", (rank + rope, hidden)
    yield "kv_a_layernorm", (rank,)
    yield "kv_b_proj", (heads * (nope + value), rank)
    yield "o_proj", (hidden, heads * value)


def _mlp(config: dict[str, Any], layer: int) -> Iterator[Tensor]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    num_experts = config.get("num_experts") or config.get("n_routed_experts") or 0
    if not num_experts or layer < config.get("first_k_dense_replace", 0):
        yield from _glu("", hidden, width)
        return
    yield "gate", (num_experts, hidden)
    for expert in range(num_experts):
        yield from _glu(f"experts.{expert}.", hidden, config["moe_intermediate_size"])
    if shared := config.get("n_shared_experts"):
        yield from _glu("shared_experts.", hidden, shared * config["moe_intermediate_size"])


def _glu(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield prefix + "gate_proj", (width, hidden)
    yield prefix + "up_proj", (width, hidden)
    yield prefix + "down_proj", (hidden, width)


def write_weights(wanted: list[Tensor], folder: Path) -> None:
    """Write bfloat16 shards and their index; one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    shards: list[list[Tensor]] = [[]]
    size = 0
    for name, shape in wanted:
        num_bytes = 2 * int(torch.Size(shape).numel())
        if size and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    where, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        made = {name: _random(name, shape) for name, shape in shard}
        save_file(made, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, shape: tuple[int, ...]) -> Any:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(shape, dtype=torch.float32)
    return made.normal_(0.0, DEVIATION, generator=generator).to(torch.bfloat16)


def write_tokenizer(config: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE: bytes, then pairs, then triples, to fill the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = {config["bos_token_id"]: "<|bos|>", config["eos_token_id"]: "<|eos|>"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    made = _words(letters)
    for token_id in range(config["vocab_size"]):
        if token_id in special:
            vocab[special[token_id]] = token_id
            continue
        left, right = next(made)
        vocab[left + right] = token_id
        if left:
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
        "eos_token": "<|eos|>", "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _words(letters: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the parts of each word: no left part for a byte, two parts for a merge."""
    for letter in letters:
        yield "", letter
    for left in letters:
        for right in letters:
            yield left, right
    for first in letters:
        for second in letters:
            for right in letters:
                yield first + second, right


def default_cache() -> Path:
    """Return MXN_HOME/bench_models."""
    from mxn import env

    return env.home() / "bench_models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SHAPES), help="shapes; default: all")
    parser.add_argument("--cache", type=Path, help="where they are kept; MXN_HOME/bench_models")
    arguments = parser.parse_args()
    cache = arguments.cache or default_cache()
    rows = []
    for name in arguments.names:
        folder = ensure(name, cache)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        rows.append({"name": name, "bytes": size})
        print(f"{name}: {size / 2**30:.2f} GiB")
    print(json.dumps({"schema": 1, "case": "bench_models", "basis": "measured", "rows": rows}))


if __name__ == "__main__":
    main()
