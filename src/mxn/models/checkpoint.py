"""The tensors of a Hugging Face directory, read lazily from one or many safetensors files.

Knows no model family. FP8 weights with a `weight_scale_inv` beside them are dequantized on the way
out, so whoever asks sees plain numbers. Start at `Checkpoint.read`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one if there is no such file.

    Raises: NotFoundError when the file is no valid JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise NotFoundError(f"{path.name} of {path.parent} is broken: {error}") from error


class Checkpoint:
    """Read access to all tensors of a model directory."""

    def __init__(self, directory: Path, *, on_progress: Progress | None = None) -> None:
        self.directory = directory
        self.config_json = read_json(directory / "config.json")
        self._file_of = _index(directory)
        self._files: dict[Path, Any] = {}
        self._on_progress = on_progress
        self._bytes_read = 0
        self.num_bytes = sum(file.stat().st_size for file in set(self._file_of.values()))
        self._unread = set(self._file_of)
        self.num_parameters = 0  # of what was read, in numbers as the model computes with them

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def unread(self) -> list[str]:
        """Tensors nobody asked for yet: after a load these are what the model does not use."""
        return sorted(self._unread)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its stored dtype (FP8 blocks as float32).

        Raises: NotFoundError when the checkpoint has no such tensor.
        """
        tensor = self._read_raw(name)
        scale_name = f"{name}_scale_inv"
        if scale_name in self:
            tensor = self._dequantize(name, tensor, self._read_raw(scale_name))
        elif tensor.is_floating_point() and tensor.itemsize == 1:
            raise UnsupportedError(f"{name} is {tensor.dtype} without {scale_name} beside it")
        elif not tensor.is_floating_point():
            raise UnsupportedError(
                f"{name} is {tensor.dtype}: the checkpoint is quantized in a way mxn does not read",
                hint="serve the checkpoint it was made from",
            )
        self.num_parameters += tensor.numel()
        return tensor

    def _dequantize(self, name: str, weight: Tensor, scale: Tensor) -> Tensor:
        """Undo the scaling of a weight, by one number or by one for each block."""
        import torch

        from mxn.kernels.ops.dequant_fp8.torch_ import dequant_fp8

        block = (self.config_json.get("quantization_config") or {}).get("weight_block_size")
        if scale.numel() == 1:
            block = tuple(weight.shape)
            scale = scale.reshape(1, 1)
        block = tuple(block) if block else (128, 128)
        blocks = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=True))
        if tuple(scale.shape) != blocks:
            raise UnsupportedError(
                f"{name}_scale_inv is {tuple(scale.shape)}; blocks of {block} in a weight of"
                f" {tuple(weight.shape)} need {blocks}"
            )
        return dequant_fp8(weight, scale.float(), block, torch.float32)

    def _read_raw(self, name: str) -> Tensor:
        if name not in self._file_of:
            close = [other for other in self.names if other.split(".")[-2:] == name.split(".")[-2:]]
            raise NotFoundError(
                f"{self.directory} has no tensor {name!r}"
                + (f"; it has {close[:3]}" if close else ""),
                hint="the checkpoint is incomplete, or config.json names the wrong architecture",
            )
        tensor = self._open(name).get_tensor(name)
        self._unread.discard(name)
        self._bytes_read += tensor.numel() * tensor.itemsize
        if self._on_progress:
            self._on_progress(min(self._bytes_read, self.num_bytes), self.num_bytes)
        return tensor

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self._file_of[name]
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise NotFoundError(
                    f"{path.name} is not a readable safetensors file: {error}",
                    hint="download it again: it is cut short or corrupted",
                ) from error
        return self._files[path]


def _index(directory: Path) -> dict[str, Path]:
    """Return tensor name -> file, from the index if there is one, else from the files."""
    from safetensors import SafetensorError, safe_open

    index = read_json(directory / "model.safetensors.index.json").get("weight_map")
    if index:
        missing = sorted({file for file in index.values() if not (directory / file).is_file()})
        if missing:
            raise NotFoundError(
                f"{directory} lacks {len(missing)} of {len(set(index.values()))} weight files:"
                f" {', '.join(missing[:3])}",
                hint="the download is incomplete",
            )
        return {name: directory / file for name, file in index.items()}
    whole = directory / "model.safetensors"
    # One whole file wins: others beside it are the same weights under their maker's names.
    files = [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        raise NotFoundError(
            f"{directory} has no *.safetensors"
            + (f" (pickle files such as {pickled[0]} are not loaded)" if pickled else ""),
            hint="convert the checkpoint with `save_pretrained(..., safe_serialization=True)`"
            if pickled
            else None,
        )
    names: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(dict.fromkeys(opened.keys(), file))
        except SafetensorError as error:
            raise NotFoundError(
                f"{file.name} is not a readable safetensors file: {error}",
                hint="download it again: it is cut short or corrupted",
            ) from error
    return names
