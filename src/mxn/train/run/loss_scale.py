"""The factor that losses are multiplied with so that gradients fit into float16.

float16 knows nothing below 6e-8 and above 65504. The factor grows while gradients stay finite; a
step whose gradients are not is left out, by all ranks alike, and the factor is halved. Ranks decide
by the global norm, which has the same bits on all of them, so nobody asks anybody. Knows no
tensors. Source: Micikevicius et al. 2017 (1710.03740), section 3.2. Start at `LossScale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST = 2.0**16
"""Of the mean loss of a step, as is usual."""
GROW_EVERY = 2000  # steps in a row that were taken
_LEAST, _MOST = 2.0**-40, 2.0**24


@dataclass(slots=True)
class LossScale:
    """A power of two, so that it changes no digit; 1 for good where nothing computes in float16."""

    value: float = 1.0
    good_steps: int = 0  # in a row, since the last change
    is_on: bool = False

    @classmethod
    def for_step(cls, num_tokens: int, *, is_on: bool) -> LossScale:
        """Return the first one for steps of about so many tokens, whose losses are summed."""
        if not is_on:
            return cls()
        return cls(value=2.0 ** round(math.log2(FIRST / num_tokens)), is_on=True)

    def takes(self, norm: float) -> bool:
        """Return whether a step is taken whose gradients have this norm, and learn from it.

        False is no error as long as a smaller factor may help; then it is, as without a factor.
        """
        if not self.is_on:
            return True
        if not math.isfinite(norm):
            if self.value <= _LEAST:
                return True  # `clip_factor` says that the loss has diverged
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps >= GROW_EVERY and self.value < _MOST:
            self.value, self.good_steps = self.value * 2, 0
        return True

    def go_on(self, value: float | None, good_steps: int) -> None:
        """Take up what a checkpoint kept; one of a job without float16 kept nothing."""
        if self.is_on and value is not None:
            self.value, self.good_steps = value, good_steps
