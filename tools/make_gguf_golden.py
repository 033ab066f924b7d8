"""Writes tests/parity/golden/gguf/: small models in GGUF, and what transformers makes of them.

Files are written by PyPI's `gguf` with its own names of tensors; logits and byte-level token ids
are those of transformers reading the file, SentencePiece ids those of `sentencepiece`. Run in an
environment of its own: `pip install torch==2.13.0 transformers accelerate gguf sentencepiece`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = Path(__file__).parents[1] / "tests" / "parity" / "golden" / "gguf"
VOCAB, CONTEXT = 400, 256
_BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "rms_norm_eps": 1e-5,
}  # fmt: skip
_MOE = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip
_WIDE = {"head_dim": 16}  # not hidden / heads
# architecture: class of the config, what differs, name in gguf, type of the matrices, tokenizer
MODELS = {
    "llama": ("LlamaConfig", {"rope_theta": 5e5}, "LLAMA", "Q8_0", "llama"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, "QWEN2", "Q4_0", "gpt2"),
    "qwen3": ("Qwen3Config", _WIDE, "QWEN3", "F16", "gpt2"),
    "qwen3moe": ("Qwen3MoeConfig", {**_WIDE, **_MOE}, "QWEN3MOE", "Q8_0", "gpt2"),
}
TEXTS = (
    "Hello world", " two  spaces", "it's 2026: 12345!", "naïve café 東京 🙂", "a\n\n b\tc",
    "<|im_start|>user\nhi<|im_end|>", "tokens of the model",
)  # fmt: skip
CORPUS = "the model takes tokens of text and the tokens make the text of the model again " * 40


def build(name: str) -> Any:
    config_class, changes, *_ = MODELS[name]
    changes = dict(changes)
    theta = changes.pop("rope_theta", 10000.0)
    config = getattr(transformers, config_class)(
        **{**_BASE, **changes}, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases too: their defaults hide mistakes
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs (i, i + H/2) of each head become neighbours, as llama.cpp's converter does."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors(name: str, model: Any) -> dict[str, np.ndarray]:
    """Return all weights under llama.cpp's names, which the `gguf` package knows."""
    config = model.config
    arch = gguf.MODEL_ARCH[MODELS[name][2]]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    out = {}
    for key, value in model.state_dict().items():
        weight = value.numpy()
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "llama" and "q_proj" in key:
            weight = permuted(weight, config.num_attention_heads)
        if name == "llama" and "k_proj" in key:
            weight = permuted(weight, config.num_key_value_heads)
        if "experts" in key:
            out |= experts(key, weight, config.moe_intermediate_size)
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert found is not None, key
        out[found] = weight
    return out


def experts(key: str, weight: np.ndarray, width: int) -> dict[str, np.ndarray]:
    layer = key.split(".")[2]
    if "gate_up" in key:
        return {
            f"blk.{layer}.ffn_gate_exps.weight": np.ascontiguousarray(weight[:, :width]),
            f"blk.{layer}.ffn_up_exps.weight": np.ascontiguousarray(weight[:, width:]),
        }
    return {f"blk.{layer}.ffn_down_exps.weight": weight}


def byte_level_tokenizer() -> tuple[list[str], list[str]]:
    """Return tokens and merges of a small byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([CORPUS], vocab_size=VOCAB - 5, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    return tokens, [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]


def write_byte_level(writer: gguf.GGUFWriter) -> None:
    tokens, merges = byte_level_tokenizer()
    kinds = [
        gguf.TokenType.CONTROL if t.startswith("<|")
        else gguf.TokenType.UNUSED if t.startswith("[PAD") else gguf.TokenType.NORMAL
        for t in tokens
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def sentencepiece_model() -> Any:
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS] * 20), model_writer=trained, vocab_size=310,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, num_threads=1, hard_vocab_limit=False,
        max_sentence_length=100_000,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def write_sentencepiece(writer: gguf.GGUFWriter, model: Any) -> None:
    count = model.vocab_size()
    kinds = [
        gguf.TokenType.UNKNOWN if model.is_unknown(i)
        else gguf.TokenType.CONTROL if model.is_control(i)
        else gguf.TokenType.BYTE if model.is_byte(i) else gguf.TokenType.NORMAL
        for i in range(count)
    ]  # fmt: skip
    padding = range(count, VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*map(model.id_to_piece, range(count)), *(f"[PAD{i}]" for i in padding)])
    writer.add_token_scores([*map(model.get_score, range(count)), *(-1e4 for _ in padding)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in padding)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write(name: str, model: Any, path: Path, pieces: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if name.startswith("qwen3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if MODELS[name][4] == "llama":
        write_sentencepiece(writer, pieces)
    else:
        write_byte_level(writer)
    matrix_type = gguf.GGMLQuantizationType[MODELS[name][3]]
    for key, weight in tensors(name, model).items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim > 1 and "ffn_gate_inp" not in key:
            kind = matrix_type
        writer.add_tensor(key, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    pieces = sentencepiece_model()
    logits, ids = {}, {}
    prompt = torch.arange(3, 17).unsqueeze(0)
    for name in MODELS:
        path = OUT / f"{name}.gguf"
        model = build(name)
        write(name, model, path, pieces)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            # With the config: transformers takes defaults for the width of heads and experts.
            OUT,
            gguf_file=path.name,
            dtype=torch.float32,
            config=model.config,
        )
        logits[name] = read.eval()(prompt).logits[0].contiguous()
        if MODELS[name][4] == "llama":
            ids[name] = {text: [1, *pieces.encode(text)] for text in TEXTS if "<|" not in text}
        elif name == "qwen2":
            tokenizer = transformers.AutoTokenizer.from_pretrained(OUT, gguf_file=path.name)
            ids[name] = {text: tokenizer.encode(text) for text in TEXTS}
    origin = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("gguf", "transformers", "sentencepiece")
    )
    save_file(logits, OUT / "logits.safetensors", metadata={"origin": origin})
    record = {"origin": origin, "ids": ids}
    text = json.dumps(record, ensure_ascii=False, indent=1)
    (OUT / "tokens.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
