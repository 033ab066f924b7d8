"""Files that are whole or not there: safetensors with their checksum, JSON, folders renamed last.

Knows nothing of layers or jobs. What is written is on the disk (fsync) when a function returns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22
# Names of safetensors, by torch's.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Written:
    """What a reader checks a file against."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write contiguous CPU tensors as safetensors and return size and checksum.

    The library's own writer holds the interpreter's lock while it copies; here each piece is
    hashed and written without it, so that training goes on beside.
    """
    views = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + len(views[name])
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text, *views.values()):
            for start in range(0, len(piece), _CHUNK):
                part = piece[start : start + _CHUNK]
                digest.update(part)
                size += file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"needs contiguous CPU tensors, got {tensor.device} {tensor.stride()}")
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def digest_of(path: Path) -> Written:
    """Return size and checksum of a file as it lies there now."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
            size += len(part)
    return Written(size, digest.hexdigest())


def write_json(path: Path, content: Any) -> None:
    """Write JSON such that a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
