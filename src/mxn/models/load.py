"""From a model directory to something the engine can run: native spec, encoder, or fallback.

Start at `load_model`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.quantized import find_format
from mxn.models.storage import read_json

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.models.base import CausalLM, TextEncoder

log = logging.getLogger("mxn.models")

Kind = Literal["decoder", "embedder", "reranker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on a device, ready to run."""

    model: CausalLM | TextEncoder
    kind: Kind
    family: str
    is_native: bool
    num_parameters: int
    dtype: str
    max_context: int
    eos_ids: tuple[int, ...] = ()
    kernels: dict[str, str] = field(default_factory=dict)
    unused_tensors: tuple[str, ...] = ()


def load_model(
    directory: Path,
    device: Device,
    dtype: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    allow_fallback: bool = True,
    prefer_fallback: bool = False,
    max_context: int | None = None,
) -> LoadedModel:
    """Load the model in `directory` onto `device`, computing in `dtype` ("float32", "bfloat16", …).

    `directory` may be a GGUF file.
    `max_context`: the context somebody asked for; models whose positions depend on it adapt.
    Raises: UnsupportedError, with the reason, for an architecture that can be served neither by a
    native spec nor through transformers, and for quantized weights that mxn does not read;
    NotFoundError for missing files or tensors.
    """
    checkpoint = Checkpoint(directory, on_progress=on_progress)
    loaded = _load(
        checkpoint, device, dtype, allow_fallback, prefer_fallback, max_context=max_context
    )
    _report_unused(loaded.unused_tensors)
    return loaded


def _load(
    checkpoint: Checkpoint,
    device: Device,
    dtype: str,
    allow_fallback: bool,
    prefer_fallback: bool,
    *,
    max_context: int | None,
) -> LoadedModel:
    import torch

    from mxn.kernels.registry import Ops
    from mxn.models.families import find_decoder, find_encoder, why_not_native

    torch_dtype = getattr(torch, dtype)
    ops = Ops.bind(device.torch_device, device.chip, torch_dtype)
    with torch.inference_mode():
        encoder = find_encoder(checkpoint.config_json)
        if encoder:
            return encoder.load(checkpoint, ops, device, torch_dtype)
        decoder = None if prefer_fallback else find_decoder(checkpoint.config_json)
        if decoder:
            return _load_native(decoder, checkpoint, ops, torch_dtype, max_context)
        reason = why_not_native(checkpoint.config_json)
        _refuse_quantized_fallback(checkpoint, reason)
        if reason and allow_fallback:
            log.info("%s is not run natively: %s", checkpoint.directory.name, reason)
        if allow_fallback:
            from mxn.models.fallback.load import load_fallback

            return load_fallback(checkpoint, ops, device, torch_dtype)
    raise UnsupportedError(
        f"no native spec for architecture {architecture(checkpoint.config_json)!r}"
        + (f": {reason}" if reason else ""),
        hint="`mxn models --families` lists the native ones",
    )


def architecture(config_json: dict[str, Any]) -> str:
    """Return the class name in config.json, or its model_type when it names none."""
    names = config_json.get("architectures") or []
    return names[0] if names else str(config_json.get("model_type", "unknown"))


def checkpoint_dtype(config_json: dict[str, Any]) -> str:
    """Return the dtype a checkpoint says it is stored in; float32 when it does not say."""
    text = config_json.get("text_config") or {}
    named = (part.get(key) for part in (config_json, text) for key in ("dtype", "torch_dtype"))
    return str(next(filter(None, named), "float32")).removeprefix("torch.")


def eos_ids(directory: Path, config_json: dict[str, Any]) -> tuple[int, ...]:
    """Return the token ids that end a sequence: generation_config.json first, then config.json."""
    for source in (read_json(directory / "generation_config.json"), config_json):
        value = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def refuse_quantization(config_json: dict[str, Any]) -> None:
    """Raise UnsupportedError if the weights are quantized in a way that mxn does not read."""
    find_format(config_json)


def _refuse_quantized_fallback(checkpoint: Checkpoint, reason: str | None) -> None:
    """Raise UnsupportedError: transformers cannot read such weights without other packages."""
    if checkpoint.format is not None:
        raise UnsupportedError(
            f"quantized weights ({checkpoint.format.name}) are read for native families only, and"
            f" {architecture(checkpoint.config_json)!r} is not run natively"
            + (f": {reason}" if reason else ""),
            hint="serve the checkpoint it was made from; `mxn models --families` lists the native",
        )


# Tensors that carry no weight of the model: buffers that older code stored, heads of pretraining.
_HARMLESS = re.compile(
    r"rotary_emb\.inv_freq$|\.masked_bias$|(^|\.)position_ids$|(^|\.)pooler\.|^cls\.|^lm_head\."
)


def _report_unused(names: tuple[str, ...]) -> None:
    """Warn about tensors nobody read: a part of the model may be missing."""
    odd = [name for name in names if not _HARMLESS.search(name)]
    if odd:
        log.warning("%d tensors of the checkpoint are not used: %s", len(odd), ", ".join(odd[:5]))


def _refuse_unused(family: Any, num_layers: int, unread: list[str]) -> None:
    """Raise UnsupportedError if a layer has a weight that the spec does not know."""
    layers = tuple(family.names.layer.format(i=i) for i in range(num_layers))
    parts = (".weight", ".bias")
    odd = [name for name in unread if name.startswith(layers) and name.endswith(parts)]
    if odd:
        raise UnsupportedError(
            f"the checkpoint has {len(odd)} weights that the {family.name} family does not use:"
            f" {', '.join(odd[:3])}",
            hint="it is a variant of that architecture; its logits would be wrong",
        )


def _load_native(
    family: Any, checkpoint: Checkpoint, ops: Any, dtype: Any, max_context: int | None
) -> LoadedModel:
    from mxn.models.decoder import Decoder
    from mxn.models.families.config import fix_long_rope, load_config

    config = load_config(checkpoint.directory, checkpoint.config_json)
    fix_long_rope(config, max_context)
    spec = family.spec(config)
    model = Decoder.load(spec, family.names, checkpoint, ops)
    _refuse_unused(family, len(spec.layers), checkpoint.unread)
    return LoadedModel(
        model=model,
        kind="decoder",
        family=spec.family,
        is_native=True,
        num_parameters=checkpoint.num_parameters,
        dtype=str(dtype).removeprefix("torch."),
        max_context=spec.max_positions,
        eos_ids=eos_ids(checkpoint.directory, checkpoint.config_json),
        kernels=ops.chosen(),
        unused_tensors=tuple(checkpoint.unread),
    )
