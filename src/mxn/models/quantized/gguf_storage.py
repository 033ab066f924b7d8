"""The tensors of a GGUF model under the names transformers uses. Knows which file holds what.

Start at `GgufStorage`; `find_gguf` says which file of a directory is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.quantized.gguf_blocks import PLAIN, to_matrix, to_plain
from mxn.models.quantized.gguf_config import architecture_of, config_json
from mxn.models.quantized.gguf_file import GgufFile, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.checkpoint import Checkpoint
    from mxn.models.quantized.matrix import QuantizedMatrix

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the model lies: in a file, perhaps one expert of several."""

    file: GgufFile
    info: TensorInfo
    expert: int | None = None
    num_heads: int = 0  # > 0: its rows are permuted within that many heads

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape if self.expert is None else self.info.shape[1:]

    def bytes(self) -> Tensor:
        if self.expert is None:
            return self.file.raw(self.info)
        part = self.info.num_bytes // self.info.shape[0]
        return self.file.raw(self.info, self.expert * part, part)


class GgufStorage:
    """Read access to a model in one GGUF file, or in several numbered ones."""

    def __init__(self, path: Path) -> None:
        """Raises: NotFoundError for missing or broken files, UnsupportedError for foreign ones."""
        self.path = path
        self.files = [GgufFile(part) for part in _parts(path)]
        self.metadata = self.files[0].metadata
        self.config_json: dict[str, Any] = config_json(self.files)
        self.config_json["dtype"] = self._dtype()
        self._places = dict(self._map())
        self.num_bytes = sum(file.num_bytes for file in self.files)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def stored_bytes(self, name: str) -> int:
        return self._places[name].bytes().numel()

    def is_quantized(self, name: str) -> bool:
        return name in self._places and self._places[name].info.type.name not in PLAIN

    def read(self, name: str) -> Tensor:
        """Return a tensor of a plain type (F32, F16, BF16); quantized ones go by `matrix`."""
        place = self._places[name]
        tensor = to_plain(place.info.type.name, place.bytes(), place.shape)
        return tensor[_unpermuted(place)] if place.num_heads else tensor

    def matrix(self, name: str) -> QuantizedMatrix:
        """Return a quantized weight [out, in]."""
        place = self._places[name]
        kind = place.info.type
        if len(place.shape) != 2:
            raise UnsupportedError(f"{self.path}: {name} is {kind.name} with shape {place.shape}")
        rows, columns = place.shape
        raw = place.bytes().view(rows, columns // kind.values, kind.num_bytes)
        matrix = to_matrix(kind.name, raw)
        return matrix.rows(_unpermuted(place)) if place.num_heads else matrix

    def _map(self) -> Iterator[tuple[str, _Place]]:
        """Yield transformers' name and the place of each tensor, experts one by one."""
        permuted: dict[str, int] = {}
        if architecture_of(self.path, self.metadata).is_permuted:
            permuted = {
                "attn_q": self.config_json["num_attention_heads"],
                "attn_k": self.config_json["num_key_value_heads"],
            }
        for file in self.files:
            for info in file.tensors.values():
                if info.name != "rope_freqs.weight":  # part of the config
                    yield from self._names_of(file, info, permuted)

    def _names_of(
        self, file: GgufFile, info: TensorInfo, permuted: dict[str, int]
    ) -> Iterator[tuple[str, _Place]]:
        stem, _, kind = info.name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if match is None:
            yield f"{_OUTER.get(stem, stem)}.{kind}", _Place(file, info)
            return
        prefix, part = f"model.layers.{match[1]}.", match[2]
        if part in _EXPERTS and len(info.shape) == 3:
            for e in range(info.shape[0]):
                yield f"{prefix}{_EXPERTS[part].format(e=e)}.{kind}", _Place(file, info, e)
            return
        name = f"{prefix}{_INNER.get(part, part)}.{kind}"
        yield name, _Place(file, info, num_heads=permuted.get(part, 0))

    def _dtype(self) -> str:
        """Return the dtype to compute in: the plain one of the matrices, or bfloat16."""
        kinds = {
            info.type.name
            for file in self.files
            for info in file.tensors.values()
            if len(info.shape) > 1
        }
        exact = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return exact.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """The way from a checkpoint over GGUF files to its quantized matrices."""

    name = "gguf"

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        storage = checkpoint.storage
        return isinstance(storage, GgufStorage) and storage.is_quantized(f"{module}.weight")

    def read(self, checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
        storage, name = checkpoint.storage, f"{module}.weight"
        assert isinstance(storage, GgufStorage)
        checkpoint.count(name, storage.stored_bytes(name))
        return storage.matrix(name)


def detect(quantization: dict[str, Any]) -> GgufFormat | None:
    """Return the format if a config (as `GgufStorage` derives it) says GGUF."""
    return GgufFormat() if quantization.get("quant_method") == "gguf" else None


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that `path` means: itself, or the one model of a directory.

    A directory with safetensors is read as such. Raises: NotFoundError when a directory holds
    several GGUF models and nothing else.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = [file for file in sorted(path.glob("*.gguf")) if not file.name.startswith("mmproj")]
    firsts = [
        f for f in found if (match := _SPLIT.fullmatch(f.name)) is None or match[2] == "00001"
    ]
    if len(firsts) > 1:
        raise NotFoundError(
            f"{path} holds {len(firsts)} GGUF models: {', '.join(f.name for f in firsts[:4])}",
            hint="name the file",
        )
    return firsts[0] if firsts else None


def _parts(path: Path) -> list[Path]:
    """Return all files of a model that is split into several (name-00001-of-00003.gguf)."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise NotFoundError(
            f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:3])}",
            hint="the download is incomplete",
        )
    return parts


def _unpermuted(place: _Place) -> Tensor:
    """Return the stored row of each row of the model.

    The converter turns each head's two halves (the rotary pairs of transformers, i and i + H/2)
    into neighbours: stored row (h, i, j) is the model's row (h, j, i), j in 0..1.
    """
    import torch

    rows = place.shape[0]
    order = torch.arange(rows).view(place.num_heads, -1, 2)
    return order.transpose(1, 2).reshape(rows)
