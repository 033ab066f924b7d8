"""The structure of a GGUF file: metadata, and where each tensor lies. Knows no model.

Our own reader, not PyPI's `gguf`: 150 lines against a package that makes a numpy view of every
vocabulary entry (seconds at 150,000 tokens) and names no tensor when a file is cut short.
Source: the specification in ggml's docs/gguf.md, versions 2 and 3. Start at `GgufFile`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMS = 4
_ALIGNMENT = 32
# Codes of the value types of metadata, with the letters of `struct`.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class BlockType:
    """How ggml stores numbers: `values` of them in `num_bytes` bytes."""

    name: str
    values: int
    num_bytes: int


# Codes of ggml.h. Those without a size here are known by name only, for a better message.
TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
}
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` as PyTorch counts (rows first), `start` in the file."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int
    num_bytes: int


class _Cursor:
    """Reads little-endian numbers and strings; says which file ended where."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            raise broken(self.path, f"it ends at byte {len(self.data)}, within {what}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def string(self, what: str) -> str:
        raw = bytes(self.take(self.scalar("Q", what), what))
        return raw.decode("utf-8", "surrogateescape")  # old files hold pieces of characters

    def value(self, code: int, what: str) -> Any:
        if code == _STRING:
            return self.string(what)
        if code == _ARRAY:
            return self._array(what)
        if code not in _SCALARS:
            raise broken(self.path, f"{what} has the unknown value type {code}")
        return self.scalar(_SCALARS[code], what)

    def _array(self, what: str) -> list[Any]:
        code, count = self.scalar("I", what), self.scalar("Q", what)
        if code == _STRING:
            return self._strings(count, what)
        if code not in _SCALARS:
            raise broken(self.path, f"{what} is a list of the unknown value type {code}")
        size = struct.calcsize(f"<{_SCALARS[code]}")
        return list(struct.unpack(f"<{count}{_SCALARS[code]}", self.take(count * size, what)))

    def _strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has hundreds of thousands: the loop is written out for speed."""
        data, at, end = self.data, self.at, len(self.data)
        length_at, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0] if start <= end else end + 1
            if at > end:
                raise broken(self.path, f"it ends at byte {end}, within {what}")
            found.append(str(data[start:at], "utf-8", "surrogateescape"))
        self.at = at
        return found


class GgufFile:
    """One file, its header read and checked; its tensors stay on disk until asked for."""

    def __init__(self, path: Path) -> None:
        """Raises: NotFoundError for a missing or broken file, UnsupportedError for others."""
        import mmap

        self.path = path
        self.num_bytes = path.stat().st_size if path.is_file() else 0
        if not path.is_file():
            raise NotFoundError(f"no file at {str(path)!r}")
        if not self.num_bytes:
            raise broken(path, "it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                self._read_header(_Cursor(path, view))
            finally:
                view.release()
        self._bytes: Tensor | None = None

    def _read_header(self, cursor: _Cursor) -> None:
        magic = bytes(cursor.take(4, "the magic"))
        if magic != _MAGIC:
            raise UnsupportedError(
                f"{self.path} is no GGUF file: it starts with {magic!r}, not {_MAGIC!r}",
                hint="older llama.cpp files (GGML, GGJT) have to be converted again",
            )
        version = cursor.scalar("I", "the version")
        if version not in _VERSIONS:
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian" if is_swapped else f"GGUF version {version}"
            raise UnsupportedError(
                f"{self.path} is {what}; versions 2 and 3, little-endian, are read"
            )
        num_tensors, num_fields = cursor.scalar("Q", "the counts"), cursor.scalar("Q", "the counts")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string("a metadata key")
            code = cursor.scalar("I", f"metadata {key!r}")
            self.metadata[key] = cursor.value(code, f"metadata {key!r}")
        entries = [_entry(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise broken(self.path, f"its alignment is {alignment!r}")
        first = -(-cursor.at // alignment) * alignment
        self.tensors = {
            name: self._place(name, shape, code, offset, first)
            for name, shape, code, offset in entries
        }

    def _place(
        self, name: str, shape: tuple[int, ...], code: int, offset: int, first: int
    ) -> TensorInfo:
        kind = _type(self.path, name, code)
        count = 1
        for size in shape:
            count *= size
        if shape[-1] % kind.values:
            raise broken(
                self.path,
                f"{name} has {shape[-1]} columns, {kind.name} has blocks of {kind.values}",
            )
        info = TensorInfo(name, shape, kind, first + offset, count // kind.values * kind.num_bytes)
        if info.start + info.num_bytes > self.num_bytes:
            raise broken(
                self.path,
                f"it ends at byte {self.num_bytes}, {name} at byte {info.start + info.num_bytes}",
            )
        return info

    def raw(self, info: TensorInfo, start: int = 0, num_bytes: int | None = None) -> Tensor:
        """Return (a part of) the bytes of a tensor, uint8 [n], mapped from the file."""
        import torch

        if self._bytes is None:
            self._bytes = torch.from_file(
                str(self.path), shared=False, size=self.num_bytes, dtype=torch.uint8
            )
        begin = info.start + start
        return self._bytes[begin : begin + (info.num_bytes if num_bytes is None else num_bytes)]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name")
    what = f"the entry of tensor {name!r}"
    num_dims = cursor.scalar("I", what)
    if not 1 <= num_dims <= _MOST_DIMS:
        raise broken(cursor.path, f"{name} has {num_dims} dimensions")
    sizes = [cursor.scalar("Q", what) for _ in range(num_dims)]  # ggml counts columns first
    if 0 in sizes:
        raise broken(cursor.path, f"{name} has no elements: {sizes}")
    return name, tuple(reversed(sizes)), cursor.scalar("I", what), cursor.scalar("Q", what)


def _type(path: Path, name: str, code: int) -> BlockType:
    if code in TYPES:
        return TYPES[code]
    known = ", ".join(kind.name for kind in TYPES.values())
    raise UnsupportedError(
        f"{path}: {name} is of type {_OTHER_TYPES.get(code, 'unknown')} ({code}); read are {known}",
        hint="take another file of this model, such as Q4_K_M, Q8_0 or Q4_0",
    )


def broken(path: Path, reason: str) -> NotFoundError:
    """Return the error for a file that is cut short or damaged."""
    return NotFoundError(
        f"{path} is not a readable GGUF file: {reason}",
        hint="download it again: it is cut short or corrupted",
    )
