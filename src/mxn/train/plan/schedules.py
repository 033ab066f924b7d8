"""In which order each stage of a pipeline does its forward and backward passes.

Knows numbers of stages, chunks and micro-batches; knows no times (`automatic` does), no devices
and no tensors. An order is complete: the executor runs just these actions, and what it
has to send and receive follows from them. Start at `order`; `order_check.validate` judges orders
from elsewhere, `order_csv` reads and writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import get_args

from mxn.errors import ConfigError, UnsupportedError
from mxn.train.plan.actions import Action, Kind, Order, Row, split_backwards, stored_peak
from mxn.train.plan.order_check import validate
from mxn.train.plan.plan import Schedule

__all__ = ["Action", "Kind", "Order", "Row", "order", "split_backwards", "stored_peak"]


def order(
    schedule: Schedule,
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    *,
    extra_warmup: int | Sequence[int] = 0,
) -> Order:
    """Return one row of actions for each stage. Chunk c of stage s is part c·S + s of the model.

    `extra_warmup` is how many forwards more than needed a stage does ahead of its first backward,
    one number or one per stage. They keep a stage busy while a slow link carries gradients back,
    and each costs the memory of one more stored micro-batch. They may not rise along the stages,
    and with chunks not fall so far that the order would never end.

    Raises: ConfigError for counts and warm-ups that no order has; UnsupportedError for chunks
    under a schedule that has none.
    Source: 1F1B Narayanan et al. 2021 (2104.04473), there also interleaved; zero-bubble Qi et al.
    2023 (2401.10241), ZB-H1; extra warm-up HAPT (2509.24859).
    """
    _check_counts(schedule, num_stages, num_chunks, num_micro_batches)
    extra = _extra_per_stage(extra_warmup, num_stages)
    return _order(schedule, num_stages, num_chunks, num_micro_batches, extra)


def _check_counts(schedule: str, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
    if schedule not in get_args(Schedule):
        raise ConfigError(
            f"unknown schedule {schedule!r}", hint=f"one of {', '.join(get_args(Schedule))}"
        )
    counts = {
        "num_stages": num_stages,
        "num_chunks": num_chunks,
        "num_micro_batches": num_micro_batches,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}")
    if num_chunks > 1 and schedule in ("gpipe", "1f1b"):
        raise UnsupportedError(
            f"{schedule} has one chunk per stage, got {num_chunks}",
            hint="the schedules with chunks are interleaved and zero-bubble",
        )


def _extra_per_stage(extra: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    per_stage = (extra,) * num_stages if isinstance(extra, int) else tuple(extra)
    if len(per_stage) != num_stages:
        raise ConfigError(f"extra_warmup has {len(per_stage)} numbers for {num_stages} stages")
    falls = all(here >= after for here, after in itertools.pairwise(per_stage))
    if min(per_stage) < 0 or not falls:
        raise ConfigError(
            f"extra_warmup must be at least 0 and not rise along the stages, got {per_stage}",
            hint="a stage can be ahead only as far as the stage before it feeds it",
        )
    return per_stage


@lru_cache(maxsize=64)
def _order(
    schedule: Schedule,
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    extra: tuple[int, ...],
) -> Order:
    sizes = _groups(num_stages, num_chunks, num_micro_batches)
    forwards, backwards, weights = (_sequence(kind, sizes, num_chunks) for kind in get_args(Kind))
    splits = schedule == "zero-bubble"
    # Of an interleaved pipeline, a stage is two steps further from the loss than the next one:
    # its forwards and its backwards pass all other stages in between.
    hop = 2 if num_chunks > 1 and not splits else 1
    rows = []
    for stage in range(num_stages):
        warmup = (num_chunks - 1) * max(sizes) + hop * (num_stages - 1 - stage) + extra[stage]
        if schedule == "gpipe":
            warmup = len(forwards)
        # ZB-H1: stage s owes s weight halves, so that each stage stores what the first one does.
        lag = stage if splits else None
        rows.append(_alternate(forwards, backwards, weights, warmup, lag))
    if num_chunks > 1 and len(set(extra)) > 1:
        # Between two chunks the first stage waits for the last, so it can be too far ahead of it.
        validate(tuple(rows), num_chunks=num_chunks, num_micro_batches=num_micro_batches)
    return tuple(rows)


def _groups(num_stages: int, num_chunks: int, num_micro_batches: int) -> list[int]:
    """Return how many micro-batches go through a chunk before the next chunk has its turn.

    As near to `num_stages` as an even division allows, never below: with fewer, the first stage
    would wait for the last one between two chunks.
    """
    if num_chunks == 1:
        return [num_micro_batches]
    num_groups = max(1, num_micro_batches // num_stages)
    size, rest = divmod(num_micro_batches, num_groups)
    return [size + (group < rest) for group in range(num_groups)]


def _sequence(kind: Kind, sizes: list[int], num_chunks: int) -> list[Action]:
    """Return all actions of a kind, group by group; chunks fall except on the way forward."""
    chunks = range(num_chunks) if kind == "F" else range(num_chunks - 1, -1, -1)
    row, first = [], 0
    for size in sizes:
        row += [Action(kind, chunk, first + i) for chunk in chunks for i in range(size)]
        first += size
    return row


def _alternate(
    forwards: list[Action],
    backwards: list[Action],
    weights: list[Action],
    warmup: int,
    lag: int | None,
) -> Row:
    """Return `warmup` forwards, then forward and backward in turn, then the backwards left over.

    With a `lag`, each backward is followed by the weight half of the `lag`-th before it.
    """
    warmup = min(warmup, len(forwards))
    row = forwards[:warmup]
    for number, backward in enumerate(backwards):
        row += forwards[warmup + number : warmup + number + 1]
        row.append(backward)
        if lag is not None and number >= lag:
            row.append(weights[number - lag])
    if lag is not None:
        row += weights[max(0, len(weights) - lag) :]
    return tuple(row)
