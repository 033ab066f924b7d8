"""What a checkpoint says of itself, and what its folders are called. No torch.

Names: `step-00000100` is complete, `step-00000100.partial-2` is being written by the second launch
of the ranks, `broken-step-00000100` was found broken and passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxn.errors import MxnError
from mxn.train.run.checkpoint.files import Written, write_json

NAME = "manifest.json"
FORMAT = "mxn-train-checkpoint/1"
_COMPLETE = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"step-(\d{8,})\.partial-(\d+)")


class BrokenError(MxnError):
    """A file of a checkpoint is missing, cut short or altered."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"checkpoint {path.parent.name} is broken: {path.name} {problem}")
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a job is. Learning rate and data order follow from it."""

    step: int  # steps done
    micro_batch: int  # index of the next one, over all epochs
    tokens: int = 0  # labels learnt from
    updates: int | None = None  # steps that changed weights; None: all of them
    loss_scale: float | None = None  # behind the last step in float16; None: there was none
    good_steps: int = 0  # in a row at that scale


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    layer: int | None  # None: what belongs to a rank, such as the state of its random numbers
    rank: int
    written: Written


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    position: Position
    job: str  # fingerprint
    plan: str  # fingerprint of the plan that wrote it
    plan_json: str
    num_layers: int
    num_ranks: int
    files: dict[str, ShardFile]
    told: dict[str, Any]  # of the job, for errors: what differs

    def write(self, folder: Path) -> None:
        """Write it with a checksum of its own; from here on the folder is a checkpoint."""
        content = asdict(self)
        write_json(folder / NAME, {"format": FORMAT, "sha256": _digest(content), "is": content})

    def missing_layers(self) -> list[int]:
        held = {file.layer for file in self.files.values()}
        return [layer for layer in range(self.num_layers) if layer not in held]


def read(folder: Path) -> Manifest:
    """Raises: BrokenError when it is not what was written."""
    path = folder / NAME
    try:
        told = json.loads(path.read_bytes())
        content = told["is"]
        if told["format"] != FORMAT:
            raise BrokenError(path, f"has format {told['format']!r}, this program reads {FORMAT!r}")
        if told["sha256"] != _digest(content):
            raise BrokenError(path, "does not have the checksum that it names")
        files = {name: _file(file) for name, file in content["files"].items()}
        content |= {"position": Position(**content["position"]), "files": files}
        return Manifest(**content)
    except FileNotFoundError:
        raise BrokenError(path, "is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenError(path, f"is no manifest: {type(error).__name__}: {error}") from error


def _file(told: dict[str, Any]) -> ShardFile:
    return ShardFile(layer=told["layer"], rank=told["rank"], written=Written(**told["written"]))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def partial_name(step: int, launch: int) -> str:
    return f"{folder_name(step)}.partial-{launch}"


def complete(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all complete checkpoints, the oldest first."""
    found = []
    for path in folder.glob("step-*"):
        match = _COMPLETE.fullmatch(path.name)
        if match and (path / NAME).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def partials(folder: Path) -> list[Path]:
    """Return folders that a launch began and did not finish, and those half removed."""
    return [
        path
        for path in folder.glob("step-*")
        if _PARTIAL.fullmatch(path.name)
        or (_COMPLETE.fullmatch(path.name) and not (path / NAME).is_file())
    ]
