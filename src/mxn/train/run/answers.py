"""What the devices of one group measured, made one. Start at `middle`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from mxn.train.plan.profile import LayerCost
from mxn.train.run.job import DeviceSettings
from mxn.train.run.stored import Reading


def middle(rows: Sequence[tuple[Reading, ...]]) -> tuple[Reading, ...]:
    """Return the median over the devices of a group for each case; the worst noise and error."""
    by_case: dict[tuple[str, int, int], list[Reading]] = {}
    for readings in rows:
        for reading in readings:
            by_case.setdefault((reading.kind, reading.micro_batch, reading.tp), []).append(reading)
    return tuple(_middle(by_case[case]) for case in sorted(by_case))


def _middle(alike: list[Reading]) -> Reading:
    def median(name: str) -> float:
        return statistics.median(getattr(reading.cost, name) for reading in alike)

    cost = LayerCost(
        forward_s=median("forward_s"), backward_s=median("backward_s"),
        optimizer_s=median("optimizer_s"), weight_s=median("weight_s"),
        activation_bytes=median("activation_bytes"),
    )  # fmt: skip
    noise = max(reading.noise for reading in alike)
    errors = [reading.error for reading in alike if reading.error is not None]
    return replace(alike[0], cost=cost, noise=noise, error=max(errors, default=None))


def notes_of(group: DeviceSettings, num_devices: int) -> tuple[str, ...]:
    """Return what a reader of the group's profile should know of it."""
    notes = [f"median of {num_devices} devices"] if num_devices > 1 else []
    if group.cpu_share is not None:
        notes.append(f"a rank limited to {group.cpu_share:g} of a core by cgroup quota")
    return tuple(notes)
