"""Writes what was trained: a Hugging Face folder of safetensors, or an adapter in PEFT's layout.

Layers come one at a time, so a model larger than memory can be written. A folder appears under its
name only when it is whole. Knows no ranks. Start at `export_model`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxn.errors import ConfigError, InternalError
from mxn.train.run import scratch
from mxn.train.run.lora import LoraSettings, merged
from mxn.train.run.owner import FORM, Owner
from mxn.train.run.weights import ModelSource

StateOf = Callable[[int], Mapping[str, Tensor]]
"""Plan layer -> its tensors, as `StageModule.layer_state` or `AdamW.master_state` give them."""

SHARD_BYTES = 4 * 10**9

# What belongs to a checkpoint beside its weights and config.json.
_COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.model", "chat_template*",
    "additional_chat_templates", "*.py", "LICENSE*", "preprocessor_config.json",
)  # fmt: skip
# Numbers that decide and are not multiplied: rounding them changes what is chosen.
_FLOAT32 = (".e_score_correction_bias",)


def export_model(
    source: ModelSource,
    state_of: StateOf,
    out: Path,
    *,
    lora: LoraSettings | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the model to the new folder `out` and return the bytes of its weights.

    `lora`: adapters among the state are added to their matrices. `dtype`: by default that of the
    checkpoint. Raises: ConfigError when `out` exists.
    """
    stored: torch.dtype = dtype or getattr(torch, source.stored_dtype)
    with new_folder(out) as folder:
        shards = _Shards(folder, shard_bytes)
        for layer in range(source.num_layers):
            state = state_of(layer)
            state = merged(state, lora) if lora else dict(state)
            for name, tensor in _wanted(source, layer, state):
                keeps = name.endswith(_FLOAT32)
                shards.add(name, _on_host(tensor, torch.float32 if keeps else stored))
        shards.close()
        _write_config(source, stored, folder)
        _copy_companions(source.folder, folder)
        return shards.num_bytes


def export_adapter(
    source: ModelSource,
    state_of: StateOf,
    out: Path,
    lora: LoraSettings,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write the adapters among the state to the new folder `out`; return the modules they adapt.

    Raises: ConfigError when `out` exists; InternalError when the state holds no adapter.
    """
    tensors = {
        f"base_model.model.{name}": _on_host(tensor, dtype)
        for layer in range(source.num_layers)
        for name, tensor in state_of(layer).items()
        if ".lora_" in name
    }
    if not tensors:
        raise InternalError("there is no adapter to export")
    cut = len("base_model.model."), len(".lora_A.weight")
    modules = sorted({name[cut[0] : -cut[1]] for name in tensors})
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", _adapter_config(source, lora, modules))
    return modules


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name when the block ends without an error.

    Raises: ConfigError when there is something under that name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", hint="name a new folder, or remove this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    form = re.compile(rf"\.{re.escape(out.name)}\.({FORM})\.part")
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        owner = Owner.in_name(left.name, form)  # not of `llama-3.2` for `llama-3`
        if owner is not None and not owner.is_alive and scratch.is_unused(left):
            shutil.rmtree(left, ignore_errors=True)  # its export was killed
    folder = out.parent / f".{out.name}.{Owner.me()}.part"
    folder.mkdir()
    handle = scratch.lock(folder)  # on a shared disk, others cannot see whether we live
    try:
        yield folder
        folder.replace(out)
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class _Shards:
    """Files of at most `limit` bytes; their number is known only at the end."""

    folder: Path
    limit: int
    num_bytes: int = 0
    _files: list[list[str]] = field(default_factory=list)  # names of the tensors in each
    _open: dict[str, Tensor] = field(default_factory=dict)
    _open_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.itemsize
        if self._open and self._open_bytes + size > self.limit:
            self._flush()
        self._open[name] = tensor
        self._open_bytes += size
        self.num_bytes += size

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        place: dict[str, str] = {}
        for number, names in enumerate(self._files):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            place |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": place}
        _write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self._open, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._open))
        self._open, self._open_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}"


def _wanted(
    source: ModelSource, layer: int, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint holds of a layer. Raises: InternalError when a tensor is missing."""
    for name, shape in source.shapes(layer).items():
        if source.spec.is_tied and name == f"{source.family.names.head}.weight":
            continue  # the embedding is it
        if name not in state or tuple(state[name].shape) != shape:
            raise InternalError(f"layer {layer} was given for export without a whole {name}")
        yield name, state[name]


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy: the state's own memory may be shared, which safetensors refuses.
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _write_config(source: ModelSource, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json as it was, but for what is about the stored weights."""
    config = {
        key: value
        for key, value in source.config_json.items()
        if key not in ("quantization_config", "torch_dtype")
    }
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = source.spec.is_tied
    # Prediction layers behind the last block are not trained, so they are not written.
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    _write_json(folder / "config.json", config)


def _copy_companions(origin: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for path in sorted(origin.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def _adapter_config(source: ModelSource, lora: LoraSettings, modules: list[str]) -> dict[str, Any]:
    rank_free = {module.rsplit(".", 1)[-1] for module in modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(rank_free),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
