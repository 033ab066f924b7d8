"""Tokenized documents in memory-mapped files, made once for a data set, tokenizer and settings.

A cache appears under its name only when it is whole, and its files are checked against their sums
when it is opened. Knows no rows. Start at `prepare`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mxn import env
from mxn.errors import UserError
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data.documents import (
    BadLineError,
    Document,
    Skipped,
    Text,
    TextSplit,
    find_files,
    read_documents,
)
from mxn.train.run.data.encode import Encoder, Learn, tokenizer_fingerprint

log = logging.getLogger("mxn.train")

_FORMAT = 1
_MANIFEST = "cache.json"
_BLOCK = 1 << 20
_GROUP = 1024

Progress = Callable[[int, int], None]
"""Called with (documents so far, tokens so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """What is read and how it becomes tokens."""

    paths: tuple[Path, ...]
    documents: TextSplit = "file"  # of plain text files
    learn: Learn = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCache:
    """All documents of a job, one behind the other."""

    folder: Path
    fingerprint: str
    tokenizer: str  # fingerprint of the tokenizer it was made with
    tokens: np.ndarray  # [S], uint16 or uint32, mapped
    targets: np.ndarray | None  # bool [S]; None: all tokens are learned
    starts: np.ndarray  # int64 [N + 1]: where each document begins, and the end of the last
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError when a model's tokenizer is not the one these tokens come from."""
        own = tokenizer_fingerprint(tokenizer)
        if own != self.tokenizer:
            raise UserError(
                f"the data was tokenized with tokenizer {self.tokenizer[:12]},"
                f" the model has tokenizer {own[:12]}",
                hint="tokenize the data with the model's own tokenizer: name the text, no cache",
            )


def prepare(
    settings: DataSettings,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    home: Path | None = None,
    on_progress: Progress | None = None,
) -> TokenCache:
    """Return the tokens of a data set: of an earlier run if nothing changed, else made now.

    The one path of the settings may be a cache itself, made elsewhere with the same tokenizer.

    `home`: the folder of all caches, by default MXN_HOME/data. A broken cache is made anew, with a
    warning. Raises: UserError when the data holds nothing to learn; as `find_files`, `Encoder`.
    """
    encoder = Encoder(tokenizer, vocab_size, learn=settings.learn)
    if len(settings.paths) == 1 and is_cache(settings.paths[0]):
        return _foreign(settings.paths[0], tokenizer, vocab_size)
    files = find_files(settings.paths)
    fingerprint = _fingerprint(files, settings, encoder)
    folder = (home or env.home() / "data") / fingerprint[:32]
    if folder.is_dir():
        try:
            return open_cache(folder)
        except UserError as error:
            log.warning("tokenized again: %s", error.message)
            shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _Writer(part, vocab_size).write(files, settings, encoder, fingerprint, on_progress)
        try:
            part.rename(folder)
        except OSError:
            # Another process was quicker with the same content.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return open_cache(folder)


def open_cache(folder: Path) -> TokenCache:
    """Map a cache. Raises: UserError when a file is missing, cut short or changed."""
    manifest = _read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"the data cache {folder} lacks {name}", hint=_AGAIN)
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UserError(
                f"{name} of the data cache {folder} has {size} bytes, not {facts['bytes']}",
                hint=_AGAIN,
            )
        if _checksum(path) != facts["crc32"]:
            raise UserError(f"{name} of the data cache {folder} was changed", hint=_AGAIN)
    has_targets = "targets.bin" in manifest["files"]
    return TokenCache(
        folder=folder,
        fingerprint=manifest["fingerprint"],
        tokenizer=manifest["tokenizer"],
        tokens=_map(folder / "tokens.bin", manifest["dtype"]),
        targets=_map(folder / "targets.bin", "bool") if has_targets else None,
        starts=np.fromfile(folder / "starts.bin", dtype=np.int64),
        skipped=Skipped(
            Counter(manifest["skipped"]["reasons"]),
            [(place, reason) for place, reason in manifest["skipped"]["examples"]],
        ),
    )


def is_cache(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def _foreign(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> TokenCache:
    """Open a cache that was made elsewhere. Raises: UserError when it is not for this model."""
    cache = open_cache(folder)
    cache.check_tokenizer(tokenizer)
    highest = int(cache.tokens.max())
    if highest >= vocab_size:
        raise UserError(
            f"the data cache {folder} has token {highest}, the model's vocabulary ends at"
            f" {vocab_size - 1}"
        )
    return cache


_AGAIN = "remove the folder: the data is then tokenized again"


class _Writer:
    """Writes the files of one cache, a document at a time."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._starts = array("q", [0])
        self._learns_all = True

    def write(
        self,
        files: Sequence[Path],
        settings: DataSettings,
        encoder: Encoder,
        fingerprint: str,
        on_progress: Progress | None,
    ) -> None:
        skipped = Skipped()
        with ExitStack() as stack:
            tokens = stack.enter_context((self._folder / "tokens.bin").open("wb"))
            targets = stack.enter_context((self._folder / "targets.bin").open("wb"))
            groups = _groups(read_documents(files, settings.documents, skipped))
            encoded = (pair for group in groups for pair in encoder.encode_all(group))
            for document, sequences in encoded:
                if isinstance(sequences, BadLineError):
                    skipped.add(document.place, str(sequences))
                    continue
                for sequence in sequences:
                    tokens.write(np.array(sequence.ids, self._dtype).tobytes())
                    targets.write(np.array(sequence.targets, np.bool_).tobytes())
                    self._starts.append(self._starts[-1] + len(sequence.ids))
                    self._learns_all = self._learns_all and all(sequence.targets)
                if on_progress:
                    on_progress(len(self._starts) - 1, self._starts[-1])
        if len(self._starts) == 1:
            names = ", ".join(file.name for file in files[:3])
            raise UserError(f"the data ({names}) holds nothing to learn: {skipped.describe()}")
        if self._learns_all:
            (self._folder / "targets.bin").unlink()
        (self._folder / "starts.bin").write_bytes(np.array(self._starts, np.int64).tobytes())
        self._write_manifest(fingerprint, encoder, skipped)

    def _write_manifest(self, fingerprint: str, encoder: Encoder, skipped: Skipped) -> None:
        facts = {
            path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            for path in sorted(self._folder.glob("*.bin"))
        }
        manifest = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "tokenizer": encoder.tokenizer_fingerprint,
            "dtype": np.dtype(self._dtype).name,
            "skipped": {"reasons": dict(skipped.reasons), "examples": skipped.examples},
            "files": facts,
        }
        (self._folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in groups that are worth all cores and fit into memory."""
    group: list[Document] = []
    num_chars = 0
    for document in documents:
        group.append(document)
        num_chars += len(document.text) if isinstance(document, Text) else 0
        if len(group) == _GROUP or num_chars > _BLOCK:
            yield group
            group, num_chars = [], 0
    if group:
        yield group


def _fingerprint(files: Sequence[Path], settings: DataSettings, encoder: Encoder) -> str:
    """Return a hash of all that decides the tokens: contents, not names or dates."""
    total = hashlib.sha256(f"{_FORMAT}:{settings.documents}:{encoder.fingerprint}".encode())
    for file in files:
        total.update(file.suffix.encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no data cache: {error}", hint=_AGAIN) from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{folder} is a data cache of another version", hint=_AGAIN)
    return manifest


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=np.dtype(dtype), mode="r")
