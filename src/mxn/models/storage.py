"""Where the tensors of a checkpoint lie: one or many safetensors files, or GGUF.

Knows files and stored names; knows no model. Start at `open_storage`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mxn.errors import NotFoundError

if TYPE_CHECKING:
    from torch import Tensor


class Storage(Protocol):
    """Tensors by name, as they are stored."""

    num_bytes: int  # of all files

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


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


def open_storage(path: Path) -> tuple[Storage, dict[str, Any]]:
    """Return the tensors and the config of a model directory or a GGUF file."""
    from mxn.models.quantized.gguf_storage import GgufStorage, find_gguf

    gguf = find_gguf(path)
    if gguf is not None:
        storage = GgufStorage(gguf)
        return storage, storage.config_json
    config_json = read_config(path)
    return SafetensorsStorage(path), config_json


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a model directory or GGUF file; empty if a directory has none.

    Raises: NotFoundError or UnsupportedError when a file cannot be read.
    """
    from mxn.models.quantized.gguf_storage import GgufStorage, find_gguf

    gguf = find_gguf(path)
    if gguf is not None:
        return GgufStorage(gguf).config_json
    config = read_json(path / "config.json")
    # Older AutoGPTQ exports keep it in a file of its own.
    older = read_json(path / "quantize_config.json")
    if older.get("bits") and "quantization_config" not in config:
        config["quantization_config"] = {"quant_method": "gptq"} | older
    return config


class SafetensorsStorage:
    """The tensors of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of = _index(directory)
        self._files: dict[Path, Any] = {}
        self.num_bytes = sum(file.stat().st_size for file in set(self._file_of.values()))

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._open(name).get_tensor(name)

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
            else "of a hub repository of GGUF files name one, as in owner/name/file.gguf",
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
