"""From a directory to a transformers config, and the parts of it that many families share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from mxn.errors import UnsupportedError
from mxn.models.spec import Activation, AttentionSpec, MlpSpec, RopeSpec

log = logging.getLogger("mxn.models")

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu",
}  # fmt: skip

# Families whose code lives with their checkpoints. Their config.json is close enough to a config of
# transformers to be read as one, so no remote code has to run.
_READ_AS = {
    "internlm": "llama", "internlm2": "llama", "internlm3": "llama", "minicpm": "llama",
    "kimi_k2": "deepseek_v3",
}  # fmt: skip
# Some of their config.json name no model_type, only a class.
_TYPE_OF_CLASS = {
    "InternLMForCausalLM": "internlm", "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3", "MiniCPMForCausalLM": "minicpm",
}  # fmt: skip
# Where their code has other defaults than the config they are read as.
_DEFAULTS: dict[str, dict[str, Any]] = {"minicpm": {"tie_word_embeddings": True}}


def load_config(directory: Path, config_json: dict[str, Any]) -> Any:
    """Return the transformers config of a model directory, its text part for multi-part models.

    `directory` may be a GGUF file: then `config_json` is all there is.

    Raises: UnsupportedError when transformers cannot make sense of it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    classes = config_json.get("architectures") or [""]
    model_type = str(config_json.get("model_type") or _TYPE_OF_CLASS.get(classes[0], ""))
    try:
        if model_type in _READ_AS:
            fields = {k: v for k, v in config_json.items() if k not in ("auto_map", "model_type")}
            fields = _DEFAULTS.get(model_type, {}) | fields
            return CONFIG_MAPPING[_READ_AS[model_type]](**fields)
        if not (directory / "config.json").is_file() and model_type in CONFIG_MAPPING:
            fields = {k: v for k, v in config_json.items() if k != "model_type"}
            return CONFIG_MAPPING[model_type](**fields)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UnsupportedError(
            f"config.json of {directory} (model_type {model_type!r}) cannot be read: {error}"
        ) from error
    return config.get_text_config()


def fix_long_rope(config: Any, wanted_context: int | None) -> None:
    """Settle which frequencies a `longrope` config uses, for all sequences alike.

    The reference code takes `short_factor` up to the original length and `long_factor` for a whole
    sequence beyond it, which would turn cached keys stale. So the context ends at the original
    length, unless a longer one is wanted by name: then all sequences use `long_factor`.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return
    original = parameters.get("original_max_position_embeddings")
    longest = config.max_position_embeddings
    if not original or original >= longest:
        return
    # The temperature of attention follows from the full length, whatever part of it is served.
    parameters["factor"] = parameters.get("factor") or longest / original
    if wanted_context is not None and wanted_context > original:
        log.info("longrope: long_factor for all texts, as the context is over %d tokens", original)
        parameters["short_factor"] = parameters["long_factor"]
        return
    log.warning(
        "context cut from %d to %d tokens, where longrope changes its frequencies;"
        " ask for a longer one with --max-context",
        longest,
        original,
    )
    config.max_position_embeddings = original


def activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not one of {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope(
    config: Any,
    *,
    dim: int | None = None,
    parameters: dict[str, Any] | None = None,
    is_interleaved: bool = False,
) -> RopeSpec:
    """Return the rotary embedding that transformers computes for this config.

    Type `dynamic` changes frequencies only beyond ``max_position_embeddings``, where no context of
    mxn goes; type `longrope` is decided by `fix_long_rope`.
    `dim`: rotary dims when they are not ``head_dim * partial_rotary_factor``. `parameters`: those
    of one layer type, for models that have several.
    """
    import copy

    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(parameters or config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        factor = parameters.get("partial_rotary_factor") or 1.0
        dim = dim or int(head_dim(config) * factor)
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = 1.0 / (parameters["rope_theta"] ** exponent)
        return RopeSpec(inv_freq=tuple(frequencies.tolist()), is_interleaved=is_interleaved)
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        raise UnsupportedError(f"rope type {kind!r} is not one of default, {known}")
    config = copy.deepcopy(config)
    config.rope_parameters = parameters
    if dim is not None:
        config.head_dim = dim
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RopeSpec(
        inv_freq=tuple(frequencies.tolist()), scale=float(scale), is_interleaved=is_interleaved
    )


def layer_windows(config: Any) -> list[int | None]:
    """Return the sliding window of each layer, from `layer_types`; None: it sees everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedError(
            f"layer_types has {', '.join(sorted(unknown))};"
            " known are full_attention and sliding_attention"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def attention(
    config: Any,
    rope_spec: RopeSpec | None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm: Literal["none", "head", "full"] = "none",
) -> AttentionSpec:
    """Return the usual grouped-query attention of a config."""
    dim = head_dim(config)
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=dim,
        scale=dim**-0.5 if scale is None else scale,
        rope=rope_spec,
        window=window,
        softcap=softcap,
        qk_norm=qk_norm,
    )


def mlp(config: Any, intermediate: int | None = None) -> MlpSpec:
    """Return the usual gated feed-forward part of a config."""
    # Gemma's configs may hold both names; the second is the one its code reads.
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return MlpSpec(
        intermediate=intermediate or config.intermediate_size, activation=activation(name)
    )


def common(config: Any) -> dict[str, Any]:
    """Return the fields of a DecoderSpec that every config names alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden": config.hidden_size,
        "norm_eps": config.rms_norm_eps,
        "max_positions": config.max_position_embeddings,
        "is_tied": bool(config.tie_word_embeddings),
    }
