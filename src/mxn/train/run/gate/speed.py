"""Whether the chips of a job are as fast as the profiles that its plan was made from.

Profiles are kept between jobs, and a chip may be slower today: throttled, shared, or never as fast
as it was told to be. Knows no plan. Start at `check_speed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.shape import ModelShape
from mxn.train.run.job import Job
from mxn.train.run.supervise.needs import SpeedError

if TYPE_CHECKING:
    from mxn.train.run.measure import Measured
    from mxn.train.run.stored import StoredProfile


def check_speed(
    job: Job, groups: tuple[str, ...], planned: Measured, again: Callable[[Job], Measured]
) -> None:
    """Measure the layers again and compare with what was planned with.

    `again` measures and stores a job's layers (`measure.measure_layers`). A chip within the job's
    tolerance, plus what repeats differ by, keeps its old profile, which was measured for longer.
    Raises: SpeedError for the chip that is furthest off; the new profile is then the stored one.
    """
    from mxn.train.run import stored

    if not planned.is_reused:
        return  # it was measured a moment ago
    now = again(replace(job, devices=tuple(job.group(name) for name in groups)))
    worst: tuple[float, str, str] | None = None
    for chip, before in planned.profiles.items():
        if chip not in now.profiles:
            continue
        want = total_s(before, planned.shape, job.micro_batch)
        got = total_s(now.profiles[chip], planned.shape, job.micro_batch)
        off = got / want - 1
        noise = max(_noise(planned.stored[chip]), _noise(now.stored[chip]))
        if abs(off) <= job.gate.speed_tolerance + noise:
            stored.store_layers(planned.stored[chip])
        elif worst is None or abs(off) > worst[0]:
            worst = (abs(off), chip, _told(chip, want, got, job.gate.speed_tolerance))
    if worst is not None:
        raise SpeedError(worst[2], chip=worst[1])


def total_s(profile: ChipProfile, shape: ModelShape, micro_batch: int) -> float:
    """Return the seconds of all layers for one micro-batch, forward and backward."""
    costs = (profile.layer(layer.kind, micro_batch, 1) for layer in shape.layers)
    return sum(cost.forward_s + cost.backward_s for cost in costs)


def _noise(profile: StoredProfile) -> float:
    """Return how far repeats lay apart, as a share; kinds that take long count for more."""
    times = [row.cost.forward_s + row.cost.backward_s for row in profile.readings]
    spread = sum(row.noise * time for row, time in zip(profile.readings, times, strict=True))
    return spread / max(sum(times), 1e-12)


def _told(chip: str, want: float, got: float, tolerance: float) -> str:
    slower = got > want
    factor = got / want if slower else want / got
    return (
        f"chip {chip} is {factor:.2g} times as {'slow' if slower else 'fast'} as its profile says: "
        f"{1e3 * got:.3g} ms for all layers of a micro-batch, {1e3 * want:.3g} ms were planned "
        f"with (tolerance {100 * tolerance:g} %)"
    )
