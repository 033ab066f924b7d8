"""A prediction layer for the tiny DeepSeek-V3 checkpoint, as published ones have it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit_config(directory: Path, **fields: object) -> None:
    """Change fields of a checkpoint's config."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add_mtp_layer(directory: Path) -> None:
    """Append the prediction layer that transformers leaves out, with random weights."""
    generator = torch.Generator().manual_seed(9)
    stored = load_file(directory / "model.safetensors")
    last, new = "model.layers.2.", "model.layers.3."
    for name in [name for name in stored if name.startswith(last)]:
        shape = stored[name].shape
        noise = torch.randn(shape, generator=generator)
        stored[name.replace(last, new)] = 1 + 0.1 * noise if len(shape) == 1 else 0.15 * noise
    hidden = stored["model.norm.weight"].shape[0]
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        stored[f"{new}{norm}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    stored[f"{new}eh_proj.weight"] = 0.15 * torch.randn(hidden, 2 * hidden, generator=generator)
    stored[f"{new}shared_head.head.weight"] = stored["lm_head.weight"].clone()
    stored[f"{new}embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, num_nextn_predict_layers=1)


def make_predictable(directory: Path) -> None:
    """Let nothing but the last token decide, in the model and in its prediction layer.

    What a branch adds to the residual stream becomes zero, and the layer sees the token alone: it
    then knows what the model will say next.
    """
    stored = load_file(directory / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    prefix, hidden = "model.layers.3.", stored["model.norm.weight"].shape[0]
    stored[f"{prefix}eh_proj.weight"] = torch.eye(hidden, 2 * hidden)
    stored[f"{prefix}enorm.weight"] = torch.ones(hidden)
    stored[f"{prefix}shared_head.norm.weight"] = stored["model.norm.weight"].clone()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
