"""Finding a checkpoint to go on from, checking it, and reading layers of it. Start at `find`.

Finding and checking need no torch. Nothing is changed but what `find` sets aside, and it says so.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mxn.errors import UserError
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.checkpoint.files import Written, digest_of
from mxn.train.run.checkpoint.manifest import BrokenError, Manifest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mxn.train")


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete checkpoint."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Stored:
        """Raises: BrokenError when the manifest is broken or a layer is in no file."""
        manifest = manifests.read(folder)
        if missing := manifest.missing_layers():
            path = folder / manifests.NAME
            raise BrokenError(path, f"has no file for layer {missing[0]} of {manifest.num_layers}")
        return cls(folder, manifest)

    def verify(self) -> None:
        """Read every file whole. Raises: BrokenError naming the first that is not as written."""
        for name, file in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BrokenError(path, "is missing")
            _compare(path, file.written, lambda path=path: digest_of(path))

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer on the CPU, checked while they are read.

        Raises: BrokenError when a file is not as it was written.
        """
        return self._read(lambda file: file.layer == layer)

    def of_rank(self, rank: int) -> dict[str, Tensor]:
        """Return what a rank stored for itself; empty where nothing was."""
        return self._read(lambda file: file.layer is None and file.rank == rank)

    def _read(self, is_wanted: Callable[[manifests.ShardFile], bool]) -> dict[str, Tensor]:
        from safetensors.torch import load

        tensors: dict[str, Tensor] = {}
        for name, file in self.manifest.files.items():
            if not is_wanted(file):
                continue
            path = self.folder / name
            if not path.is_file():
                raise BrokenError(path, "is missing")
            data = path.read_bytes()
            found = Written(len(data), hashlib.sha256(data).hexdigest())
            _compare(path, file.written, lambda found=found: found)
            tensors |= load(data)
        return tensors


def _compare(path: Path, want: Written, read: Callable[[], Written]) -> None:
    size = path.stat().st_size
    if size != want.num_bytes:
        raise BrokenError(path, f"has {size} bytes, {want.num_bytes} were written")
    if read().sha256 != want.sha256:
        raise BrokenError(path, "does not have the checksum that was written")


def find(folder: Path, resume: Literal["newest", "intact", "never"]) -> Stored | None:
    """Return the verified checkpoint to go on from, or None where there is none.

    "newest": the newest, and an error if it is broken. "intact": broken ones are renamed to
    `broken-…`, with a warning each, and the newest that is whole is taken. "never": those of an
    earlier run are moved to `before-…`. No rank may be running.
    Raises: UserError naming the broken file and what to do.
    """
    remove_partials(folder)
    found = [path for _, path in reversed(manifests.complete(folder))]
    if resume == "never":
        _set_aside(folder, found)
        return None
    problems: list[BrokenError] = []
    for path in found:
        try:
            stored = Stored.open(path)
            stored.verify()
        except BrokenError as error:
            problems.append(error)
            if resume == "newest":
                break
            continue
        _pass_over(problems)
        return stored
    if problems:
        raise UserError(problems[0].message, hint=_hint(folder, resume, found))
    return None


def check_job(stored: Stored, job: str, told: dict[str, object]) -> None:
    """Raises: UserError when the checkpoint was written by a job that learns something else."""
    if stored.manifest.job == job:
        return
    before = stored.manifest.told
    names = [name for name in told if told[name] != before.get(name)]
    shown = "; ".join(f"{n}: {before.get(n)!r} then, {told[n]!r} now" for n in names[:3])
    raise UserError(
        f"{stored.folder} was written by another job ({shown or 'fingerprints differ'})",
        hint="set these values back, choose another `out`, or checkpoint: {resume: never}",
    )


def remove_partials(folder: Path) -> None:
    """Remove what a killed launch left half written."""
    for path in manifests.partials(folder):
        log.info("removing %s: its writers were stopped before it was complete", path.name)
        shutil.rmtree(path)


def _pass_over(problems: list[BrokenError]) -> None:
    for error in problems:
        path = error.path.parent
        aside = _free(path.parent, f"broken-{path.name}")
        log.warning("%s; passed over and kept as %s", error.message, aside.name)
        path.rename(aside)


def _set_aside(folder: Path, found: list[Path]) -> None:
    if not found:
        return
    aside = _free(folder, "before")
    aside.mkdir()
    log.warning("%d checkpoints of an earlier run moved to %s", len(found), aside)
    for path in found:
        path.rename(aside / path.name)


def _free(folder: Path, name: str) -> Path:
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    return folder / f"{name}-{number}"


def _hint(folder: Path, resume: str, found: list[Path]) -> str:
    if resume == "intact" or len(found) < 2:
        return f"no other checkpoint in {folder} is whole; start anew with another `out`"
    return (
        "restore the file, or go on from an older checkpoint that is whole with "
        f"checkpoint: {{resume: intact}} (there are {len(found) - 1} older ones)"
    )
