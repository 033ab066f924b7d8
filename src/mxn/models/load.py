"""From a model directory to something the engine can run: native spec, encoder, or fallback.

Start at `load_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint, read_json

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.models.base import CausalLM, TextEncoder

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
) -> LoadedModel:
    """Load the model in `directory` onto `device`, computing in `dtype` ("float32", "bfloat16", …).

    Raises: UnsupportedError, with the reason, for an architecture that can be served neither by a
    native spec nor through transformers; NotFoundError for missing files or tensors.
    """
    import torch

    from mxn.kernels.registry import Ops
    from mxn.models.families import find_decoder, find_encoder

    checkpoint = Checkpoint(directory, on_progress=on_progress)
    torch_dtype = getattr(torch, dtype)
    ops = Ops.bind(device.torch_device, device.chip, torch_dtype)
    with torch.inference_mode():
        encoder = find_encoder(checkpoint.config_json)
        if encoder:
            return encoder.load(checkpoint, ops, device, torch_dtype)
        decoder = None if prefer_fallback else find_decoder(checkpoint.config_json)
        if decoder:
            return _load_native(decoder, checkpoint, ops, device, torch_dtype)
        if allow_fallback:
            from mxn.models.fallback.load import load_fallback

            return load_fallback(checkpoint, ops, device, torch_dtype)
    raise UnsupportedError(
        f"no native spec for architecture {architecture(checkpoint.config_json)!r}",
        hint="`mxn models --families` lists the native ones",
    )


def architecture(config_json: dict[str, Any]) -> str:
    """Return the class name in config.json, or its model_type when it names none."""
    names = config_json.get("architectures") or []
    return names[0] if names else str(config_json.get("model_type", "unknown"))


def checkpoint_dtype(config_json: dict[str, Any]) -> str:
    """Return the dtype a checkpoint says it is stored in; float32 when it does not say."""
    text = config_json.get("text_config") or {}
    name = config_json.get("dtype") or config_json.get("torch_dtype") or text.get("dtype")
    return str(name or "float32").removeprefix("torch.")


def eos_ids(directory: Path, config_json: dict[str, Any]) -> tuple[int, ...]:
    """Return the token ids that end a sequence: generation_config.json first, then config.json."""
    for source in (read_json(directory / "generation_config.json"), config_json):
        value = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _load_native(
    family: Any, checkpoint: Checkpoint, ops: Any, device: Device, dtype: Any
) -> LoadedModel:
    from mxn.models.decoder import Decoder
    from mxn.models.families.config import load_config

    spec = family.spec(load_config(checkpoint.directory, checkpoint.config_json))
    model = Decoder.load(spec, family.names, checkpoint, ops)
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
