"""From a model directory to something the engine can run: native spec, encoder, or fallback.

Start at `load_model`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.native.files import is_artifact
from mxn.models.quantized import find_format
from mxn.models.storage import read_json

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.kernels.native.formats import ModelFormat
    from mxn.models.base import CausalLM, TextEncoder
    from mxn.models.native.decoder import NativeParts
    from mxn.models.spec import DecoderSpec

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
    format: ModelFormat | None = None,
    num_threads: int = 1,
    prediction: bool = False,
) -> LoadedModel:
    """Load the model in `directory` onto `device`, computing in `dtype` ("float32", "bfloat16", …).

    `directory` may be a GGUF file.
    `max_context`: the context somebody asked for; models whose positions depend on it adapt.
    `format`: pack the weights for the native kernels of a processor, with `num_threads` threads.
    `prediction`: read prediction layers for these kernels too (plain weights always have them).
    Raises: UnsupportedError, with the reason, for an architecture that can be served neither by a
    native spec nor through transformers, and for quantized weights that mxn does not read;
    NotFoundError for missing files or tensors.
    """
    if is_artifact(directory):
        return _load_artifact(
            directory, device, format, num_threads, max_context, prediction=prediction
        )
    checkpoint = Checkpoint(directory, on_progress=on_progress)
    if format is not None:
        return _load_packed(
            checkpoint, device, format, num_threads, max_context, prediction=prediction
        )
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


def pack_model(
    directory: Path, format: ModelFormat, out: Path, *, adapter: Path | None = None
) -> int:
    """Write the model in `directory` as an artifact with weights in `format`; return its bytes.

    `adapter`: a LoRA folder in PEFT's layout, added to the weights before they are packed.
    Raises: UnsupportedError when native kernels cannot run it; ConfigError when `out` exists.
    """
    import torch

    from mxn.models.merged import MergedCheckpoint
    from mxn.models.native import artifact
    from mxn.models.native.decoder import read_parts

    merged = MergedCheckpoint(directory, adapter) if adapter else None
    checkpoint = merged or Checkpoint(directory)
    refuse_quantization(checkpoint.config_json)
    family, spec = _native_spec(directory, checkpoint.config_json, None)
    with torch.inference_mode():
        parts = read_parts(spec, family.names, checkpoint, format, prediction=True)
    if merged is not None:
        merged.check()
    _refuse_unused(family, len(spec.layers), checkpoint.unread)
    # The frequencies of LongRoPE depend on the context that is asked for at load.
    is_fixed = "longrope" not in json.dumps(checkpoint.config_json)
    return artifact.save(parts, spec if is_fixed else None, directory, out)


def _load_artifact(
    directory: Path,
    device: Device,
    format: ModelFormat | None,
    num_threads: int,
    max_context: int | None,
    *,
    prediction: bool,
) -> LoadedModel:
    from mxn.models.native import artifact

    _refuse_device(device, "an artifact")
    config_json = read_json(directory / "config.json")
    parts, stored = artifact.load(directory)
    spec = stored or _native_spec(directory, config_json, max_context)[1]
    if format is not None and format.weights != parts.format.weights:
        raise UnsupportedError(
            f"{directory.name} is packed as {parts.format.weights}, not {format.weights}",
            hint="leave out --weights, or pack the original again",
        )
    if prediction and not parts.mtp:
        raise UnsupportedError(
            f"speculation mtp: the artifact {directory.name} has no prediction layer",
            hint="`mxn pack` a checkpoint that has one, or --speculation ngram",
        )
    if format is not None:
        parts = replace(parts, format=replace(parts.format, cache=format.cache))
    return _packed_model(spec, parts, directory, config_json, num_threads)


def _load_packed(
    checkpoint: Checkpoint,
    device: Device,
    format: ModelFormat,
    num_threads: int,
    max_context: int | None,
    *,
    prediction: bool,
) -> LoadedModel:
    """Load a decoder onto the native kernels. Raises: UnsupportedError with the reason."""
    import torch

    from mxn.models.native.decoder import read_parts

    _refuse_device(device, f"weights in {format.weights}")
    family, spec = _native_spec(checkpoint.directory, checkpoint.config_json, max_context)
    with torch.inference_mode():
        parts = read_parts(spec, family.names, checkpoint, format, prediction=prediction)
    _refuse_unused(family, len(spec.layers), checkpoint.unread)
    unused = tuple(checkpoint.unread)
    return _packed_model(
        spec, parts, checkpoint.directory, checkpoint.config_json, num_threads, unused
    )


def _packed_model(
    spec: DecoderSpec,
    parts: NativeParts,
    directory: Path,
    config_json: dict[str, Any],
    num_threads: int,
    unused: tuple[str, ...] = (),
) -> LoadedModel:
    from mxn.kernels.native import library
    from mxn.models.native.decoder import NativeDecoder
    from mxn.models.native.settle import settle

    model = NativeDecoder(spec, parts, num_threads=num_threads)
    notes = settle(model, config_json, num_threads)
    return LoadedModel(
        model=model,
        kind="decoder",
        family=spec.family,
        is_native=True,
        num_parameters=parts.num_parameters,
        dtype=str(parts.format.weights),
        max_context=spec.max_positions,
        eos_ids=eos_ids(directory, config_json),
        kernels={"step": f"native {library().variant()}: {parts.format}"} | notes,
        unused_tensors=unused,
    )


def _refuse_device(device: Device, what: str) -> None:
    if device.torch_device != "cpu":
        raise UnsupportedError(
            f"{what} runs on processors, not on {device.id}",
            hint="--device cpu, or the original checkpoint without --weights",
        )


def _native_spec(
    directory: Path, config_json: dict[str, Any], max_context: int | None
) -> tuple[Any, DecoderSpec]:
    """Return family and spec of a decoder. Raises: UnsupportedError when there is none."""
    from mxn.models.families import find_decoder, why_not_native
    from mxn.models.families.config import fix_long_rope, load_config

    family = find_decoder(config_json)
    if family is None:
        reason = why_not_native(config_json) or "no native spec"
        raise UnsupportedError(
            f"packed weights need a native decoder; {architecture(config_json)!r} has none:"
            f" {reason}",
            hint="leave out --weights",
        )
    config = load_config(directory, config_json)
    fix_long_rope(config, max_context)
    return family, family.spec(config)
