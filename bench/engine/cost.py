"""What a step must read and compute at least, from a config.json; the limit of a table's cell.

Knows shapes and bits; measures nothing. A lower bound: activations, cache writes and tables of
rotary angles are not counted. Start at `bytes_per_step` and `prefill_flop`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import tensors

from mxn.kernels.native import formats


def bits(weights: str) -> float:
    """Return the bits of one weight with its share of scales, where no file tells."""
    name = weights.partition("/")[0]
    return 16.0 if name == "plain" else _bits_of(formats.parse_weights(name))


def _bits_of(format: formats.WeightFormat) -> float:
    extra = 0 if not format.group else 16 if format.is_symmetric else 32
    return format.bits + extra / (format.group or 1)


def _head_bits(weights: str) -> float:
    name = weights.partition("/")[0]
    return 16.0 if name == "plain" else _bits_of(formats.parse(name).head)


@dataclass(frozen=True, slots=True)
class Shape:
    """Parameters of a model: all, those one token's step touches (the head included), the head's
    and those of all routed experts."""

    config: dict[str, Any]
    stored: int
    active: int
    head: int
    experts: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        config = json.loads((folder / "config.json").read_text())
        stored = dense = experts = 0
        for name, dims in tensors(config):
            size = _product(dims)
            stored += size
            if ".experts." in name:
                experts += size
            elif name != "model.embed_tokens.weight" or config["tie_word_embeddings"]:
                dense += size
        active = dense + round(experts * _chosen(config))
        return cls(config, stored, active, config["vocab_size"] * config["hidden_size"], experts)

    def parameters_read(self, batch: int) -> float:
        """Return the parameters a step of `batch` tokens reads at least.

        Of a mixture that is an expectation: each token chooses its experts at random and apart
        from the others, which routers with random weights nearly do.
        """
        chosen = _chosen(self.config)
        touched = 1.0 - (1.0 - chosen) ** batch
        return self.active + self.experts * (touched - chosen)

    def kv_values(self) -> int:
        """Values that one token keeps in the cache; MLA in its latent form."""
        config = self.config
        if "kv_lora_rank" in config:
            per_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            per_layer = 2 * config["num_key_value_heads"] * config["head_dim"]
        return per_layer * config["num_hidden_layers"]


def _chosen(config: dict[str, Any]) -> float:
    """Return the part of the routed experts that one token uses; 0 without experts."""
    num_experts = config.get("num_experts") or config.get("n_routed_experts") or 0
    return config["num_experts_per_tok"] / num_experts if num_experts else 0.0


def _product(dims: tuple[int, ...]) -> int:
    result = 1
    for dim in dims:
        result *= dim
    return result


def weight_bytes(built: Path, weights: str, shape: Shape) -> float:
    """Return the stored size of the weights: of the engine's own file, or by the format's bits."""
    files = [built] if built.suffix == ".gguf" else list(built.glob("openvino_model.bin"))
    if files:
        return float(sum(file.stat().st_size for file in files))
    rest = (shape.stored - shape.head) * bits(weights)
    return (rest + shape.head * _head_bits(weights)) / 8


def bytes_per_step(
    shape: Shape, stored_bytes: float, kv_bytes: int, context: int, batch: int
) -> float:
    """Return the least bytes one step reads: weights once, the cache of each sequence."""
    part = min(1.0, shape.parameters_read(batch) / shape.stored)
    return stored_bytes * part + batch * context * shape.kv_values() * kv_bytes


def prefill_flop(shape: Shape, tokens: int) -> float:
    """Return the operations of a prompt: matrix products of each token, the head of the last one.

    Attention is half a square, its two products; a multiply and an add are two.
    """
    config = shape.config
    products = 2.0 * (shape.active - shape.head) * tokens + 2.0 * shape.head
    width = config["num_attention_heads"] * config.get("head_dim", config.get("v_head_dim", 0))
    return products + 2.0 * config["num_hidden_layers"] * width * tokens * tokens
