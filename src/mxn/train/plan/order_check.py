"""Find what is wrong with an order before it runs: missing or doubled actions, deadlocks.

Knows no times: an order that passes ends whatever its actions take, as long as a message can
wait for its receiver. Start at `validate`.
"""

from __future__ import annotations

from typing import get_args

from mxn.errors import ConfigError
from mxn.train.plan.actions import Action, Kind, Order, Row

_BEFORE: dict[str, Kind] = {"B": "F", "W": "B"}
_NEEDED: tuple[Kind, ...] = ("F", "B")


def validate(
    order: Order, *, num_chunks: int | None = None, num_micro_batches: int | None = None
) -> None:
    """Check that each stage does each pass once and that no stage waits for ever.

    Without `num_chunks` and `num_micro_batches`, they are as many as the order itself names.
    Raises: ConfigError that names the stage and the action.
    """
    if not order or not all(order):
        empty = next((stage for stage, row in enumerate(order) if not row), 0)
        raise ConfigError(f"stage {empty} has no action")
    chunks = num_chunks or 1 + max(action.chunk for row in order for action in row)
    batches = num_micro_batches or 1 + max(action.micro_batch for row in order for action in row)
    for stage, row in enumerate(order):
        _check_row(stage, row, chunks, batches)
    stuck = _stuck(order, chunks)
    if stuck:
        waits = "; ".join(f"stage {s} at {action} waits for {why}" for s, action, why in stuck)
        raise ConfigError(f"this order never ends: {waits}")


def _check_row(stage: int, row: Row, num_chunks: int, num_micro_batches: int) -> None:
    seen: set[Action] = set()
    for action in row:
        kind, chunk, micro_batch = action
        if kind not in get_args(Kind):
            raise ConfigError(f"stage {stage}: unknown kind of action {kind!r}, known are F, B, W")
        if not (0 <= chunk < num_chunks and 0 <= micro_batch < num_micro_batches):
            raise ConfigError(
                f"stage {stage}: there is no {action}: it has {num_chunks} chunks "
                f"and {num_micro_batches} micro-batches"
            )
        if action in seen:
            raise ConfigError(f"stage {stage} does {action} twice")
        before = _BEFORE.get(kind)
        if before and Action(before, chunk, micro_batch) not in seen:
            raise ConfigError(
                f"stage {stage} does {action} before {Action(before, chunk, micro_batch)}"
            )
        seen.add(action)
    for kind in _NEEDED:
        for chunk in range(num_chunks):
            for micro_batch in range(num_micro_batches):
                if Action(kind, chunk, micro_batch) not in seen:
                    raise ConfigError(f"stage {stage} lacks {Action(kind, chunk, micro_batch)}")


def _stuck(order: Order, num_chunks: int) -> list[tuple[int, Action, str]]:
    """Run the order without times; return each stage that does not end, and what it waits for."""
    num_stages = len(order)
    last_part = num_chunks * num_stages - 1
    at = [0] * num_stages
    done: set[tuple[str, int, int]] = set()
    waiting: dict[tuple[str, int, int], int] = {}  # the pass waited for: who waits
    todo = list(range(num_stages))
    while todo:
        stage = todo.pop()
        row = order[stage]
        while at[stage] < len(row):
            kind, chunk, micro_batch = row[at[stage]]
            part = chunk * num_stages + stage
            need = _need(kind, part, micro_batch, last_part)
            if need is not None and need not in done:
                waiting[need] = stage
                break
            here = (kind, part, micro_batch)
            done.add(here)
            at[stage] += 1
            if here in waiting:
                todo.append(waiting.pop(here))
    return [
        (stage, order[stage][at[stage]], _name(need, num_stages))
        for need, stage in sorted(waiting.items(), key=lambda item: item[1])
    ]


def _need(kind: str, part: int, micro_batch: int, last_part: int) -> tuple[str, int, int] | None:
    """Return the pass of another part that this one needs; what its own row owes is checked."""
    if kind == "F" and part > 0:
        return ("F", part - 1, micro_batch)
    if kind == "B" and part < last_part:
        return ("B", part + 1, micro_batch)
    return None


def _name(need: tuple[str, int, int], num_stages: int) -> str:
    kind, part, micro_batch = need
    return f"{kind}{micro_batch} of part {part} on stage {part % num_stages}"
