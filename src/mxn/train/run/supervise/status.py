"""status.json: how a job goes, for people and programs. Start at `Status`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mxn.errors import NotFoundError
from mxn.train.run.control import write_whole
from mxn.train.run.owner import Owner
from mxn.train.run.supervise.words import FINAL, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """`is_alive` is worked out when it is read: whether its supervisor still runs."""

    job: str
    phase: str
    reason: str
    groups: tuple[str, ...]
    dropped: dict[str, str]  # group -> why
    launch: int
    restarts: int
    checkpoint_step: int | None
    plan: str | None  # fingerprint
    pid: int
    started: int  # of that process, as `Owner` has it: numbers come again
    updated_at: float  # seconds since 1970
    last: dict[str, Any] = field(default_factory=dict)  # the last line of metrics.jsonl
    said: tuple[str, ...] = ()  # the last things the supervisor said
    is_alive: bool = True


def write(path: Path, job: str, state: State, plan: str | None, **more: Any) -> None:
    me = Owner.me()
    status = Status(
        job=job,
        phase=state.phase,
        reason=state.reason,
        groups=state.active,
        dropped={name: gone.reason for name, gone in state.dropped.items()},
        launch=state.launch,
        restarts=state.restarts,
        checkpoint_step=state.checkpoint_step if state.checkpoint_step >= 0 else None,
        plan=plan,
        pid=me.pid,
        started=me.started,
        updated_at=time.time(),
        **more,
    )
    told = asdict(status)
    del told["is_alive"]
    write_whole(path, json.dumps(told))


def read(out: Path) -> Status:
    """Return the status of the job in a folder. Raises: NotFoundError where there is none."""
    path = out / "status.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no training job has run in {out}") from None
    told.setdefault("started", -1)  # as one of an earlier version has it
    is_alive = told["phase"] not in FINAL and Owner(told["pid"], told["started"]).is_alive
    told |= {"groups": tuple(told["groups"]), "said": tuple(told["said"])}
    return Status(**told, is_alive=is_alive)
