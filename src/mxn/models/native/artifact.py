"""Packed weights on disk, in the layout the kernels read: a load maps the file and is done.

An artifact is a model directory: config.json and tokenizer of its source, `mxn-artifact.json` that
says what lies where, and `weights.mxn`. Knows bytes and part names; knows nothing of steps. Start
at `save` and `load`.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxn import __version__
from mxn.errors import ConfigError, NotFoundError, UnsupportedError, UserError
from mxn.kernels.native.formats import ModelFormat, WeightFormat
from mxn.kernels.native.pack import PackedWeight
from mxn.models import tokenizer_facts
from mxn.models.native.files import MANIFEST, WEIGHTS
from mxn.models.native.reader import NativeMla, NativeMoe
from mxn.models.quantized.gguf_export import write_files
from mxn.models.quantized.gguf_storage import find_gguf
from mxn.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlaSpec,
    MlpSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
)
from mxn.models.tokenizer import Tokenizer
from mxn.models.weights import GqaWeights, LayerWeights, MlpWeights, MtpWeights

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.native.decoder import NativeParts

log = logging.getLogger("mxn.models")

LAYOUT = 2  # of packed weights: another number means that they must be packed again
_ALIGN = 4096  # a memory page, so that large parts begin on one
_SMALL_ALIGN = 64
_PARTS = {
    part.__name__: part
    for part in (
        GqaWeights, LayerWeights, MlpWeights, MtpWeights, NativeMla, NativeMoe, DecoderSpec,
        LayerSpec, AttentionSpec, MlaSpec, MlpSpec, MoeSpec, RopeSpec, RouterSpec,
    )
}  # fmt: skip
_COPIED = (  # config, tokenizer and what people read; weights come in too many suffixes to name
    "config.json", "generation_config.json", "tokenizer*", "*.model", "*.tiktoken", "vocab*.json",
    "vocab*.txt", "merges*.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
    "chat_template*", "README*", "LICENSE*", "NOTICE*",
)  # fmt: skip
_ID_BYTES = 16  # at the end of the weights, and in the manifest: the two belong together


def save(parts: NativeParts, spec: DecoderSpec | None, source: Path, directory: Path) -> int:
    """Write an artifact of `parts`, whose config and tokenizer lie in `source`; return its bytes.

    `spec`: what a load would else work out from config.json; None where that depends on settings.
    The directory appears whole or not at all. Raises: ConfigError when it exists.
    """
    refuse_existing(directory)
    _remove_leftovers(directory)
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True)
    try:
        writer = _Writer(scratch / WEIGHTS)
        tree = writer.encode(_as_dict(parts))
        spec_tree = writer.encode(spec)
        pair = os.urandom(_ID_BYTES)
        num_bytes = writer.close(pair)
        _copy_files(source, scratch)
        _keep_facts(scratch)
        manifest = {
            "layout": LAYOUT,
            "format": dataclasses.asdict(parts.format),
            "num_parameters": parts.num_parameters,
            "bytes": num_bytes,
            "parts": tree,
            "id": pair.hex(),
            "spec": spec_tree,
            "spec_of": _spec_version(),
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest))
        scratch.rename(directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return num_bytes


def load(directory: Path) -> tuple[NativeParts, DecoderSpec | None]:
    """Map an artifact; its spec is None where config.json must tell it.

    Raises: NotFoundError or UnsupportedError that say what is wrong with it.
    """
    from mxn.models.native.decoder import NativeParts

    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        layout, expected = manifest["layout"], manifest["bytes"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise _broken(path, error) from None
    if layout != LAYOUT:
        raise UnsupportedError(
            f"{str(directory)!r} was packed in layout {layout}, this mxn reads {LAYOUT}",
            hint="pack it again with `mxn pack`",
        )
    file = directory / WEIGHTS
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes, not {expected}"
        raise NotFoundError(f"{str(file)!r} {what}", hint="copy or pack it again")
    with file.open("rb") as opened:
        area = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    _refuse_other(file, area[-_ID_BYTES:].hex(), manifest.get("id"))
    area.madvise(mmap.MADV_WILLNEED)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    try:
        parts = NativeParts(
            format=_format(manifest["format"]),
            num_parameters=manifest["num_parameters"],
            **_decode(manifest["parts"], memory),
        )
        stored = manifest["spec"]
        # Another mxn may describe models by other fields, or read a config in another way.
        is_ours = manifest.get("spec_of") == _spec_version()
        return parts, _decode(stored, memory) if is_ours else None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _broken(path, error) from None


def refuse_existing(directory: Path) -> None:
    """Raises: ConfigError when there is something where an artifact is to be written."""
    if directory.exists():
        raise ConfigError(f"{str(directory)!r} exists", hint="name another --out, or remove it")


def _remove_leftovers(directory: Path) -> None:
    """Remove what packing processes that were killed left beside `directory`."""
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):
        pid = path.name.removeprefix(f".{directory.name}.").removesuffix(".tmp")
        if not pid.isdecimal():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:  # it runs, for somebody else
            continue


def _spec_version() -> str:
    """Return a name for what a stored spec means: this mxn, and the fields of its classes."""
    digest = hashlib.sha256()
    for name in sorted(_PARTS):
        if name.endswith("Spec"):
            digest.update(f"{name}: {[f.name for f in dataclasses.fields(_PARTS[name])]}".encode())
    return f"{__version__} {digest.hexdigest()[:16]}"


def _refuse_other(file: Path, found: str, expected: str | None) -> None:
    """Raises: UnsupportedError when the weights are of another pack than the manifest.

    `expected` None: the artifact was packed before there were ids.
    """
    if expected is not None and found != expected:
        raise UnsupportedError(
            f"{str(file)!r} has id {found}, its {MANIFEST} says {expected}",
            hint="copy both files from one artifact, or pack it again",
        )


def _copy_files(source: Path, directory: Path) -> None:
    """Bring config and tokenizer of a model directory or GGUF file into `directory`."""
    gguf = find_gguf(source)
    if gguf is not None:
        write_files(gguf, directory)
        return
    for file in source.iterdir():
        if file.is_file() and any(fnmatch(file.name, known) for known in _COPIED):
            shutil.copyfile(file, directory / file.name)


def _keep_facts(directory: Path) -> None:
    """Work out now what a load would count through the vocabulary for."""
    if not (directory / "tokenizer.json").is_file():
        return
    try:
        tokenizer_facts.write(directory, Tokenizer.load(directory).facts)
    except UserError as error:  # the weights are good; who loads them gets this as an error
        log.warning("packed with a tokenizer that cannot be used: %s", error.message)


def _broken(path: Path, error: Exception) -> NotFoundError:
    return NotFoundError(f"{str(path)!r} is broken: {error!r}", hint="pack it again")


def _as_dict(parts: NativeParts) -> dict[str, Any]:
    names = ("table_VD", "head", "layers", "final_norm", "mtp")
    return {name: getattr(parts, name) for name in names}


def _format(fields: dict[str, Any]) -> ModelFormat:
    return ModelFormat(
        weights=WeightFormat(**fields["weights"]),
        head=WeightFormat(**fields["head"]),
        cache=fields["cache"],
        act_group=fields["act_group"],
    )


class _Writer:
    """Appends tensors to a file and says where each lies."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def encode(self, part: Any) -> Any:
        """Return `part` as JSON, its tensors written to the file."""
        if part is None or isinstance(part, int | float | str | bool):
            return part
        if isinstance(part, torch.Tensor):
            return {"tensor": self._write(part), "dtype": str(part.dtype).removeprefix("torch."),
                    "shape": list(part.shape)}  # fmt: skip
        if isinstance(part, list):
            return [self.encode(item) for item in part]
        if isinstance(part, tuple):
            return {"tuple": [self.encode(item) for item in part]}
        if isinstance(part, dict):
            return {name: self.encode(item) for name, item in part.items()}
        if isinstance(part, PackedWeight):
            return {"packed": dict(self._packed(part))}
        if type(part).__name__ in _PARTS:
            fields = {f.name: self.encode(getattr(part, f.name)) for f in dataclasses.fields(part)}
            return {"part": type(part).__name__, "fields": fields}
        raise UnsupportedError(f"an artifact cannot hold a {type(part).__name__}")

    def _packed(self, weight: PackedWeight) -> Iterator[tuple[str, Any]]:
        yield "format", dataclasses.asdict(weight.format)
        for name in ("out_features", "in_features", "gain", "data", "scales", "mins", "bias"):
            yield name, self.encode(getattr(weight, name))

    def _write(self, tensor: Tensor) -> tuple[int, int]:
        align = _ALIGN if tensor.nbytes >= _ALIGN else _SMALL_ALIGN
        start = -(-self._file.tell() // align) * align
        self._file.seek(start)
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        self._file.write(memoryview(raw.numpy()))
        return start, tensor.nbytes

    def close(self, last: bytes) -> int:
        """Write `last` behind all tensors and return the bytes of the file."""
        self._file.write(last)
        num_bytes = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return num_bytes


def _decode(part: Any, memory: Tensor) -> Any:
    """Return what `_Writer.encode` was given, its tensors being views of `memory`."""
    if isinstance(part, list):
        return [_decode(item, memory) for item in part]
    if not isinstance(part, dict):
        return part
    if "tensor" in part:
        start, length = part["tensor"]
        raw = memory[start : start + length]
        return raw.view(getattr(torch, part["dtype"])).view(part["shape"])
    if "tuple" in part:
        return tuple(_decode(item, memory) for item in part["tuple"])
    if "packed" in part:
        fields = dict(part["packed"])
        wanted = WeightFormat(**fields.pop("format"))
        return PackedWeight(wanted, **{k: _decode(item, memory) for k, item in fields.items()})
    if "part" in part:
        fields = {name: _decode(item, memory) for name, item in part["fields"].items()}
        return _PARTS[part["part"]](**fields)
    return {name: _decode(item, memory) for name, item in part.items()}
