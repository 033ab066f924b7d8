"""What the supervisor of a job, its ranks and a user say to each other: files in the job's folder.

    status.json              how it goes, for `mxn train status`
    control/pause-3          ranks of launch 3: write a checkpoint and end
    control/finished-3       rank 0 of launch 3: the last step is done and stored
    control/words-3-1.json   the last words of rank 1: why it ends
    control/asked.jsonl      a user: drop a group, take one back
    log/launch-3/rank-1.log  what a rank printed

Knows no decisions. Start at `Control`.
"""

from __future__ import annotations

import json
import os
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mxn.errors import ChipError, MxnError, UserError

Kind = Literal["user", "chip", "peer", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """Why a rank ended. `kind` peer: it only lost another one."""

    kind: Kind
    message: str
    device: str = ""


class Control:
    """The files of one launch."""

    def __init__(self, out: Path, launch: int) -> None:
        self.folder = out / "control"
        self.launch = launch
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def _pause(self) -> Path:
        return self.folder / f"pause-{self.launch}"

    def ask_pause(self) -> None:
        self._pause.touch()

    def is_pause_asked(self) -> bool:
        return self._pause.exists()

    @property
    def _finished(self) -> Path:
        return self.folder / f"finished-{self.launch}"

    def say_finished(self) -> None:
        """Rank 0: the last step is done, its checkpoint and the model are on the disk."""
        self._finished.touch()

    def is_finished(self) -> bool:
        return self._finished.exists()

    def _words(self, rank: int) -> Path:
        return self.folder / f"words-{self.launch}-{rank}.json"

    def leave_words(self, rank: int, error: BaseException, device: str = "") -> None:
        """Say why this rank ends, where the disk has room for it: it ends in any case."""
        words = last_words(error, device)
        with suppress(OSError):
            write_whole(self._words(rank), json.dumps(asdict(words)))

    def words_of(self, rank: int) -> LastWords | None:
        """Return what a rank left, None where it could not."""
        try:
            return LastWords(**json.loads(self._words(rank).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def last_words(error: BaseException, device: str = "") -> LastWords:
    """Sort an error: the user's, a chip's, the loss of a peer, or another."""
    message = error.message if isinstance(error, MxnError) else ""
    if not message:
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    names = {kind.__name__ for kind in type(error).__mro__}
    if "PeerError" in names:
        return LastWords(kind="peer", message=message, device=device)
    if isinstance(error, ChipError) or "AcceleratorError" in names:
        return LastWords(kind="chip", message=message, device=getattr(error, "device", device))
    if isinstance(error, UserError):
        return LastWords(kind="user", message=str(error), device=device)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    return LastWords(kind="other", message=message + place, device=device)


def ask(out: Path, action: Literal["drop", "grow", "stop"], group: str = "") -> None:
    """Tell the supervisor of the job in `out`, which looks about every second."""
    folder = out / "control"
    if not folder.is_dir():
        raise UserError(f"no job runs in {out}", hint="`mxn train status` lists jobs")
    line = json.dumps({"action": action, "group": group}) + "\n"
    handle = os.open(folder / "asked.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


class Asked:
    """Reads what was asked since the last look."""

    def __init__(self, out: Path) -> None:
        self._path = out / "control" / "asked.jsonl"
        self._at = self._path.stat().st_size if self._path.is_file() else 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def write_whole(path: Path, text: str) -> None:
    """Write a small file such that a reader never sees a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
