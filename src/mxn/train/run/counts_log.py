"""`micro-batches.jsonl` in a job's folder: how a run shared out its micro-batches again, and why.

Rank 0 writes a line before the first step with other counts. Ranks that start again behind a
checkpoint read it and do the same steps with the same counts, to the bit; commands show it. That
nothing was changed is no line: `micro-batches-done.json` keeps how many steps were done with each
plan, so that none of them is done again with counts decided anew. Knows files; decides nothing.
Start at `read`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mxn.train.run.control import write_whole
from mxn.train.run.rebalance import Change, Since

NAME = "micro-batches.jsonl"
DONE_NAME = "micro-batches-done.json"


def read(out: Path, plan: str | None) -> list[Change]:
    """Return what was decided for a plan, by its fingerprint as it was planned; ascending."""
    return [_change(row) for row in _rows(out) if row["plan"] == plan]


def since(changes: list[Change], first_step: int) -> list[Since]:
    """Return which counts steps from `first_step` on were done with, without the plan's own."""
    past = [change for change in changes if change.step <= first_step][-1:]
    to_come = [change for change in changes if change.step > first_step]
    return [(change.step, change.after) for change in (*past, *to_come)]


def read_all(out: Path) -> list[Change]:
    """Return what was decided for any plan of the job, in the order in which it was."""
    return [_change(row) for row in _rows(out)]


def append(out: Path, plan: str, change: Change) -> None:
    """Add a decision. A reader sees all lines or all but this one."""
    _write(out, [*_rows(out), {"plan": plan, **asdict(change)}])


def forget(out: Path) -> None:
    """Remove all decisions: the job's steps begin anew, or are done with the plan's own counts."""
    for name in (NAME, DONE_NAME):
        (out / name).unlink(missing_ok=True)


def begin(out: Path, plan: str, num_done: int) -> int:
    """Say that ranks start with a plan; return how many steps any before them did with it.

    `num_done`: steps up to the last one that was ever reached by the ranks that ran before these,
    whose plan may have been another. Steps of another plan hold nothing up in this one.
    """
    path = out / DONE_NAME
    marks: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if marks:
        before = list(marks)[-1]  # the plan of the last start
        marks[before] = max(marks[before], num_done)
    mine = marks.pop(plan, 0)
    write_whole(path, json.dumps(marks | {plan: mine}))
    return mine


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / NAME
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(out / NAME, "".join(json.dumps(row) + "\n" for row in rows))


def _change(row: dict[str, Any]) -> Change:
    told: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
    del told["plan"]
    return Change(**told)
