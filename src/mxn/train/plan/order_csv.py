"""Orders as CSV, in the form of `torch.distributed.pipelining` (`_load_csv`, `compute_only`).

One line per stage, one cell per action: the part of the model, a letter, the micro-batch, as in
`2F0`. A part is a stage of torch: part p lies on stage p mod S. torch writes `B` for a whole
backward and `I` for its input half; empty cells are only for the eye. Text in, text out; no I/O.
"""

from __future__ import annotations

import csv
import io
import re

from mxn.errors import ConfigError, UnsupportedError
from mxn.train.plan.actions import Action, Kind, Order, split_backwards
from mxn.train.plan.order_check import validate

_CELL = re.compile(r"(\d+)([FIBW])(\d+)")
# Cells that torch adds when it lowers an order. Here they follow from the actions.
_COMMUNICATION = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|(SEND|RECV)_[FB])\d*")
_KIND_OF_LETTER: dict[str, Kind] = {"F": "F", "B": "B", "I": "B", "W": "W"}


def to_csv(order: Order) -> str:
    """Return an order as text that torch's `_load_csv` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for stage, row in enumerate(order):
        split = split_backwards(row)
        cells = []
        for kind, chunk, micro_batch in row:
            letter = "I" if kind == "B" and (chunk, micro_batch) in split else kind
            cells.append(f"{chunk * len(order) + stage}{letter}{micro_batch}")
        writer.writerow(cells)
    return text.getvalue()


def from_csv(text: str, *, source: str = "schedule") -> Order:
    """Return the order that a CSV text holds, checked.

    Communication cells of torch's lowered form are left out: who sends what follows from the
    actions. `source` is the name of the file, for messages.

    Raises: ConfigError with line and cell for what is no order; UnsupportedError for parts that
    lie elsewhere than on stage p mod S (V-shaped schedules) and for overlapped pairs.
    """
    lines = [line for line in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in line)]
    rows = []
    for stage, line in enumerate(lines):
        actions = (_action(cell.strip(), stage, len(lines), source) for cell in line)
        rows.append(tuple(action for action in actions if action is not None))
    order = tuple(rows)
    _check_letters(lines, order, source)
    validate(order)
    return order


def _action(cell: str, stage: int, num_stages: int, source: str) -> Action | None:
    if not cell or _COMMUNICATION.fullmatch(cell):
        return None
    where = f"{source}:{stage + 1}"
    if cell.endswith("OVERLAP_F_B"):
        raise UnsupportedError(f"{where}: {cell!r} overlaps two passes, which is not provided")
    match = _CELL.fullmatch(cell)
    if match is None:
        raise ConfigError(
            f"{where}: {cell!r} is no action", hint="a cell is part, letter, micro-batch: 2F0"
        )
    part, micro_batch = int(match[1]), int(match[3])
    if part % num_stages != stage:
        raise UnsupportedError(
            f"{where}: {cell!r} puts part {part} on stage {stage} of {num_stages}",
            hint=f"part {part} belongs on stage {part % num_stages}; V-shaped orders do not run",
        )
    return Action(_KIND_OF_LETTER[match[2]], part // num_stages, micro_batch)


def _check_letters(lines: list[list[str]], order: Order, source: str) -> None:
    """An `I` must have its `W`, and a `B` must have none: else gradients are lost or doubled."""
    for stage, (line, row) in enumerate(zip(lines, order, strict=True)):
        split = split_backwards(row)
        for cell in line:
            match = _CELL.fullmatch(cell.strip())
            if match is None or match[2] not in "IB":
                continue
            pair = (int(match[1]) // len(order), int(match[3]))
            if match[2] == "I" and pair not in split:
                raise ConfigError(f"{source}:{stage + 1}: {cell.strip()!r} has no W for it")
            if match[2] == "B" and pair in split:
                raise ConfigError(
                    f"{source}:{stage + 1}: {cell.strip()!r} is a whole backward, and there is a W",
                    hint="write I for the input half",
                )
