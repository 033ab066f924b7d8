"""From the metadata of a GGUF file to the config.json its model would have. Knows no tensors' data.

Keys: "<architecture>.<what>" of llama.cpp's converter. Start at `config_json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxn.errors import UnsupportedError
from mxn.models.quantized.gguf_file import GgufFile

_MISSING = object()
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp in the words of transformers."""

    class_name: str
    model_type: str
    is_permuted: bool = False  # rows of q and k are stored for interleaved rotary pairs
    has_experts: bool = False


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", is_permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", has_experts=True),
}


class Fields:
    """Metadata of one file; a missing key or a value of another kind is an error."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.architecture = metadata.get("general.architecture", "unnamed")

    def count(self, key: str, default: Any = _MISSING) -> int:
        """Return a positive whole number, "<architecture>.<key>".

        Newer files may give one for each layer; all must be equal. Raises: UnsupportedError.
        """
        value = self._get(key, default)
        if isinstance(value, list) and value:
            if len(set(map(str, value))) != 1:
                raise UnsupportedError(f"{self.path}: {key} differs among layers: {value[:6]}")
            value = value[0]
        return self._checked(key, value, int)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """Return a positive number. Raises: UnsupportedError."""
        return self._checked(key, self._get(key, default), (int, float))

    def _checked(self, key: str, value: Any, kind: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise UnsupportedError(f"{self.path}: {key} is {value!r}, not a positive number")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default))

    def has(self, key: str) -> bool:
        return bool(self.metadata.get(f"{self.architecture}.{key}"))

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is _MISSING:
            raise UnsupportedError(
                f"{self.path} has no metadata {self.architecture + '.' + key!r}",
                hint="it was made by a very old converter: take a newer file of this model",
            )
        return value


def architecture_of(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    """Raises: UnsupportedError for an architecture whose tensor names are not known."""
    name = str(metadata.get("general.architecture", "unnamed"))
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path} holds the architecture {name!r}; GGUF files of"
            f" {', '.join(ARCHITECTURES)} are read",
            hint="serve the safetensors checkpoint of this model",
        )
    return ARCHITECTURES[name]


def config_json(files: Sequence[GgufFile]) -> dict[str, Any]:
    """Return what config.json would hold.

    `files`: of one model; the first has the metadata, each has some of the tensors.
    Raises: UnsupportedError for a foreign architecture, a missing key or an unknown variant.
    """
    file = files[0]
    shapes = {name: info.shape for part in files for name, info in part.tensors.items()}
    architecture = architecture_of(file.path, file.metadata)
    fields = Fields(file.path, file.metadata)
    heads = fields.count("attention.head_count")
    hidden = fields.count("embedding_length")
    if not architecture.has_experts and fields.has("expert_count"):
        raise UnsupportedError(
            f"{file.path} is a {fields.architecture} with experts",
            hint="serve the safetensors checkpoint of this model",
        )
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": _rows(file.path, shapes, "token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(fields, hidden // heads),
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(fields, _frequency_factors(files)),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "quantization_config": {"quant_method": "gguf"},
        **_token_ids(file.metadata),
    }
    if architecture.model_type == "qwen2":
        del config["attention_bias"]  # it always has them, and no such field
    if architecture.has_experts:
        config |= _experts(fields)
    return config


def _rows(path: Path, shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise UnsupportedError(
            f"{path} has no tensor {name!r}",
            hint="name the first file of a split model; adapters and projectors are no models",
        )
    return shapes[name][0]


def _head_dim(fields: Fields, default: int) -> int:
    dim = fields.count("attention.key_length", default)
    rotary = fields.count("rope.dimension_count", dim)
    if rotary != dim:
        raise UnsupportedError(f"{fields.path} rotates {rotary} of {dim} dims of a head")
    return dim


def _experts(fields: Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.count("expert_count"),
        "num_experts_per_tok": fields.count("expert_used_count"),
        "moe_intermediate_size": fields.count("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does for this architecture
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _frequency_factors(files: Sequence[GgufFile]) -> list[float]:
    """Return the divisor of each rotary frequency, from whichever file has them; [] for none."""
    from mxn.models.quantized.gguf_blocks import to_plain

    for file in files:
        info = file.tensors.get("rope_freqs.weight")
        if info is not None:
            return to_plain(info.type.name, file.raw(info), info.shape).float().tolist()
    return []


def _rope(fields: Fields, factors: list[float]) -> dict[str, Any]:
    """Return `rope_parameters`. Llama 3's scaling is stored as a divisor of each frequency."""
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    if factors:
        return {
            "rope_type": "longrope", "rope_theta": theta, "attention_factor": 1.0,
            "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": fields.count("context_length"),
        }  # fmt: skip
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{fields.path}: rope scaling {kind!r} is not one of none, linear, yarn"
        )
    scaling = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": fields.number("rope.scaling.factor"),
    }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.count(
            "rope.scaling.original_context_length"
        )
    return scaling


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return bos and eos ids; the end of a turn ends an answer like the end of a text.

    Files name one or two of them; llama.cpp, too, adds those it knows by their text.
    """
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ends += [i for i, token in enumerate(tokens) if token in _ENDS]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
    }
