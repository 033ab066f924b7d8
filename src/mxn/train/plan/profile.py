"""What one layer costs on one chip: measured, derived or simulated, and said which.

Start at `ChipProfile.layer`. A profile never guesses: what it does not hold is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mxn.errors import UserError
from mxn.train.plan.memory import MemoryModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One layer, one micro-batch, one tensor-parallel width; its communication included.

    `backward_s` is both halves. `weight_s` is the part of it that makes weight gradients and can
    wait (zero-bubble schedules); None: unknown, taken as half.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float  # once per step, of the whole layer
    weight_s: float | None = None
    activation_bytes: float | None = None  # measured, of this micro-batch; None: from the shape

    def __post_init__(self) -> None:
        """Raises: UserError for what is negative or no number: sums would hide it."""
        numbers = (
            self.forward_s, self.backward_s, self.optimizer_s, self.weight_s or 0.0,
            self.activation_bytes or 0.0,
        )  # fmt: skip
        if not all(0 <= number < math.inf for number in numbers):
            raise UserError(f"{self!r} holds a number that is negative or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipProfile:
    """Costs of each kind of layer on one chip: `costs[kind, micro_batch, tp]`."""

    chip: str
    costs: Mapping[tuple[str, int, int], LayerCost]
    framework_bytes: float = 0.0  # taken on a device before any weight is there
    basis: str = "measured"
    fingerprint: str = ""  # of chip, driver, torch, model shape and dtype; "" for public sets
    notes: tuple[str, ...] = field(default=())
    memory: MemoryModel | None = None  # of what it computes in; None: the job's
    width: float = 1.0  # bytes of its values, as a multiple of the shape's
    is_float32: bool = False  # its values are float32, which some links carry narrower
    overlaps_sums: bool = False  # gradients are summed while it does its last backward pass

    def layer(self, kind: str, micro_batch: int, tp: int) -> LayerCost:
        """Raises: UserError when this was not profiled."""
        cost = self.costs.get((kind, micro_batch, tp))
        if cost is None:
            raise UserError(
                f"the profile of {self.chip} has no {kind!r} at micro-batch {micro_batch}, tp {tp}",
                hint="profile it with `mxn train profile`",
            )
        return cost

    def has(self, kind: str, micro_batch: int, tp: int) -> bool:
        return (kind, micro_batch, tp) in self.costs


Profiles = Mapping[str, ChipProfile]
"""By chip."""
