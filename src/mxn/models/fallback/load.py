"""From a checkpoint that mxn has no spec for to a `FallbackDecoder`, or to the reason why not.

Start at `load_fallback`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mxn import env
from mxn.errors import ConfigError, MxnError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from mxn.chips.chip import Device
    from mxn.kernels.registry import Ops
    from mxn.models.checkpoint import Checkpoint
    from mxn.models.fallback.decoder import FallbackDecoder
    from mxn.models.fallback.probe import Probe
    from mxn.models.load import LoadedModel

log = logging.getLogger("mxn.models.fallback")

# For models whose config names no limit on positions: enough for the engine to plan with.
_UNNAMED_MAX_POSITIONS = 32_768


def load_fallback(
    checkpoint: Checkpoint, ops: Ops, device: Device, torch_dtype: torch.dtype
) -> LoadedModel:
    """Load through transformers, swap attention and linears, compare with the untouched model.

    MXN_FALLBACK_CHECK=off skips the comparison (five short passes through the model).
    Raises: UnsupportedError with the reason when the model cannot run over a paged cache.
    """
    from mxn.models.load import LoadedModel, architecture, eos_ids

    name = architecture(checkpoint.config_json)
    config, model_class = _resolve(checkpoint, name)
    model, info = _read(checkpoint, model_class, config, torch_dtype)
    model.eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = _swap_and_check(model, config, ops, name)
    return LoadedModel(
        model=decoder,
        kind="decoder",
        family=f"transformers:{config.model_type}",
        is_native=False,
        num_parameters=num_parameters,
        dtype=str(torch_dtype).removeprefix("torch."),
        max_context=decoder.max_positions,
        eos_ids=eos_ids(checkpoint.directory, checkpoint.config_json),
        kernels=ops.chosen(),
        unused_tensors=tuple(sorted(info["unexpected_keys"])),
    )


def refused(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} has no native spec and cannot run through transformers either: {reason}",
        hint="docs/reference/fallback.md lists what runs",
    )


def _resolve(checkpoint: Checkpoint, name: str) -> tuple[Any, Any]:
    """Return the transformers config and class of a checkpoint. Raises: UnsupportedError."""
    import transformers

    from mxn.models.fallback.reasons import forgo_token_count, why_not

    model_type = checkpoint.config_json.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise refused(
            name, f"transformers {transformers.__version__} has no model type {model_type!r}"
        )
    config = transformers.AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise refused(name, "it is an encoder-decoder")
    model_class = _causal_class(config, name)
    if model_class is None:
        raise refused(name, f"transformers has no causal language model of type {model_type!r}")
    reason = why_not(config, model_class)
    if reason:
        raise refused(name, reason)
    forgo_token_count(config)
    return config, model_class


def _causal_class(config: Any, name: str) -> Any | None:
    """Return the class that config.json names, if it is a decoder, else the one of the config."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return getattr(transformers, name)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return None


def _read(
    checkpoint: Checkpoint, model_class: Any, config: Any, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Read the weights the way transformers does, with its renaming and merging of tensors."""
    model, info = model_class.from_pretrained(
        checkpoint.directory,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise NotFoundError(
            f"{checkpoint.directory} lacks {len(missing)} tensors of {model_class.__name__}:"
            f" {missing[:3]}",
            hint="the checkpoint is incomplete, or its config.json names the wrong architecture",
        )
    return model, info


def _place(model: Any, device: torch.device) -> Any:
    """Move the model to the device, with experts in a form that the device can compute."""
    has_choice = type(model)._can_set_experts_implementation()
    if has_choice and device.type not in ("cpu", "cuda"):
        # torch has grouped products for these two; a loop over experts runs anywhere.
        log.info(
            "experts run one after the other: device type %r has no grouped product", device.type
        )
        model.set_experts_implementation("eager")
    return model.to(device)


def _swap_and_check(model: Any, config: Any, ops: Ops, name: str) -> FallbackDecoder:
    from mxn.models.fallback.check import check, check_sequences, reference_logits
    from mxn.models.fallback.decoder import FallbackDecoder
    from mxn.models.fallback.linear import swap_linears

    sequences = check_sequences(config)
    is_checked = _is_checked()
    try:
        # On the CPU: asking a mask about far positions may index out of range, which is an error
        # to catch there and the end of the process's context on some devices.
        probe = _probe(model, sequences[0])
        model = _place(model, ops.device)
        want = reference_logits(model, sequences, ops.device) if is_checked else []
        swap_linears(model, ops)
        decoder = FallbackDecoder(
            model,
            probe.calls,
            ops,
            max_positions=_max_positions(config, probe),
            position_offset=probe.position_offset,
        )
        error = check(decoder, sequences, want) if is_checked else None
    except UnsupportedError as why:
        raise refused(name, why.message) from why
    except MxnError:
        raise
    except Exception as error:
        # Code of a model that is not made for flattened tokens can fail in any way; the caller is
        # told which one, and the cause stays attached.
        reason = f"its code fails on flattened tokens ({type(error).__name__}: {error})"
        raise refused(name, reason) from error
    log.info("%s runs through transformers; error of the load-time check: %s", name, error)
    return decoder


def _is_checked() -> bool:
    value = env.get("MXN_FALLBACK_CHECK")
    if value not in ("on", "off"):
        raise ConfigError(f"MXN_FALLBACK_CHECK must be on or off, got {value!r}")
    return value == "on"


def _probe(model: Any, tokens: list[int]) -> Probe:
    import torch

    from mxn.models.fallback.probe import probe_model

    with torch.inference_mode():
        probe = probe_model(model, torch.tensor(tokens))
    if not probe.calls:
        raise UnsupportedError("it never called attention through the attention interface")
    return probe


def _max_positions(config: Any, probe: Probe) -> int:
    """Return the context that gives exact results: positions, rope switches, chunks."""
    from mxn.models.fallback.reasons import exact_context

    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    named = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    chunks = (call.chunk for call in probe.calls)
    limits = [named or _UNNAMED_MAX_POSITIONS, exact_context(text), *chunks]
    limit = min(value for value in limits if value) - probe.position_offset
    if named and limit < named:
        log.info("context cut from %d to %d tokens: beyond it results would depend on"
                 " neighbours, or attention works in chunks", named, limit)  # fmt: skip
    return limit
