"""The learning rate as a pure function of the step: so a resumed job needs no state for it.

Knows no torch. Start at `learning_rate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mxn.errors import ConfigError

Shape = Literal["constant", "linear", "cosine", "wsd"]
SHAPES: tuple[Shape, ...] = ("constant", "linear", "cosine", "wsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then by `shape` down to `peak` · `floor` at the last step.

    `wsd` (warm-up, stable, decay) stays at the peak until the last `decay_steps`, then falls
    linearly. Source: arXiv 2404.06395, section 4.
    """

    peak: float
    num_steps: int
    shape: Shape = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None  # of wsd; None: a tenth of all steps
    floor: float = 0.0  # share of the peak

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule {self.shape!r} is none of {', '.join(SHAPES)}")
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise ConfigError(f"the learning rate must be at least 0, got {self.peak!r}")
        if self.num_steps < 1:
            raise ConfigError(f"a schedule needs at least 1 step, got {self.num_steps!r}")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ConfigError(
                f"warmup_steps must be 0 to {self.num_steps}, the steps of the job,"
                f" got {self.warmup_steps!r}"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"the floor is a share of the peak, 0 to 1, got {self.floor!r}")
        if self.decay_steps is not None and not 0 <= self.decay_steps <= self.num_steps:
            raise ConfigError(f"decay_steps must be 0 to {self.num_steps}, got {self.decay_steps}")


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the rate of step 0, 1, …; the first step of a warm-up is above 0 already."""
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / schedule.warmup_steps
    return schedule.peak * (schedule.floor + (1 - schedule.floor) * _share(schedule, step))


def _share(schedule: Schedule, step: int) -> float:
    """Return how far above the floor a step behind the warm-up is: 1 at the peak, 0 at the end."""
    if schedule.shape == "constant":
        return 1.0
    first = schedule.warmup_steps
    if schedule.shape == "wsd":
        decay = schedule.decay_steps
        decay = max(1, schedule.num_steps // 10) if decay is None else decay
        first = max(first, schedule.num_steps - decay)
    # The last step is one before the end: the end itself would be a step that learns nothing.
    left = max(1, schedule.num_steps - first)
    done = min(1.0, max(0.0, (step - first) / left))
    if schedule.shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done
