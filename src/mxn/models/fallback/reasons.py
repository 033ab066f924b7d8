"""Why a checkpoint cannot run through the fallback, as far as its config and its class tell.

Knows transformers' configs and model classes; loads no weights. Start at `why_not`.
"""

from __future__ import annotations

import inspect
from typing import Any

STATEFUL_LAYERS = {
    "linear_attention": "linear attention or state-space",
    "mamba": "state-space",
    "recurrent": "recurrent",
    "rglru": "recurrent",
    "conv": "convolution",
    "hybrid": "hybrid attention/state-space",
    "hybrid_sliding": "hybrid attention/state-space",
}
SPARSE_LAYERS = {
    "indexed_attention": "attention over positions chosen by an indexer",
    "compressed_sparse_attention": "attention over compressed keys",
    "heavily_compressed_attention": "attention over compressed keys",
    "minimax_m3_sparse": "attention over blocks chosen by an indexer",
    "reference_sliding_attention": "attention whose window depends on the prompt",
}


def why_not(config: Any, model_class: Any) -> str | None:
    """Return the reason why this model cannot run over a paged cache, or None if none is known."""
    text = config.get_text_config(decoder=True)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        return f"its weights are quantized ({method}), which only native families read"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return _layer_reason(text) or _class_reason(model_class)


def _layer_reason(text: Any) -> str | None:
    kinds = [
        kind
        for name in ("layer_types", "layers_block_type", "block_types", "_block_types")
        for kind in (getattr(text, name, None) or ())
    ]
    for kind in kinds:
        if kind in STATEFUL_LAYERS:
            return f"it has {STATEFUL_LAYERS[kind]} layers, whose state is not in pages"
        if kind in SPARSE_LAYERS:
            return f"it has {SPARSE_LAYERS[kind]}"
    return None


def _class_reason(model_class: Any) -> str | None:
    if getattr(model_class, "_is_stateful", False):
        return "it keeps a recurrent state beside the attention cache"
    if not model_class._can_set_attn_implementation():
        return "its code does not call attention through transformers' attention interface"
    parameters = inspect.signature(model_class.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "position_ids" not in parameters and not takes_any:
        return "it does not take the positions of its tokens as an input"
    return None


def exact_context(text: Any) -> int | None:
    """Return up to which context a sequence's result does not depend on the rest of its step.

    `dynamic` and `longrope` embeddings switch frequencies for the whole step by its longest text;
    below the limit they never switch. Llama 4 scales queries by a count of the step's tokens; below
    the limit the factor is one, see `forgo_token_count`.
    """
    parameters = getattr(text, "rope_parameters", None) or {}
    sets = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    limits = []
    for chosen in sets:
        kind = chosen.get("rope_type")
        if kind == "longrope":
            original = chosen.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", None))
        elif kind == "dynamic":
            limits.append(getattr(text, "max_position_embeddings", None))
    if hasattr(text, "attn_temperature_tuning"):
        limits.append(text.floor_scale - 1)
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def forgo_token_count(config: Any) -> None:
    """Switch off Llama 4's scaling of queries by ``floor((token + 1) / floor_scale)``.

    It counts the tokens of the step instead of using their positions. Within `exact_context` the
    factor is one whether the scaling is on or off.
    """
    text = config.get_text_config(decoder=True)
    if hasattr(text, "attn_temperature_tuning"):
        text.attn_temperature_tuning = False
