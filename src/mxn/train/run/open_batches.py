"""Micro-batches of a step that belong to no pipeline: who gets to one first takes it.

A chip whose speed changes within a step leaves the others waiting, whatever was measured before.
So each pipeline does most of its share, and the rest is taken one by one from a counter that all
ranks see. A slow pipeline leaves the last ones to the quick ones, which are done with them sooner
than it would be. Which pipeline adds a gradient is then another in each run: results agree to float
noise, not to the bit. Start at `Sharing`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mxn.errors import InternalError
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.search.shares import Pace
from mxn.train.run.rebalance import Counts, share_out

if TYPE_CHECKING:
    from mxn.train.run.bridge import Bridge

_ALIKE = 1.25  # times the pace of the quickest: such pipelines never leave one to others
_STEPS = 5  # whose median speed is believed: one in which a chip stood still says little
_BEHIND = 2 / 3  # of a micro-batch is still to do when the next one is taken: its backward pass


def can_be_open(plan: TrainPlan) -> bool:
    """Return whether every pipeline of a plan is one rank, which can do one more at any time.

    Under zero-bubble a step ends with a half of a backward pass, behind which none fits.
    """
    has_whole_passes = plan.schedule in ("1f1b", "gpipe")
    return (
        has_whole_passes
        and len(plan.pipelines) > 1
        and all(
            len(pipeline.stages) == 1
            and len(pipeline.stages[0].chunks) == 1
            and pipeline.stages[0].tp == 1
            for pipeline in plan.pipelines
        )
    )


def owned(counts: Counts, share: float) -> Counts:
    """Return what each pipeline does in any case when `share` of its micro-batches is open."""
    return tuple(max(1, count - math.floor(count * share)) for count in counts)


def likely(counts: Counts, share: float, each_s: Sequence[float]) -> Counts:
    """Return what pipelines will do of a step when `share` of their `counts` is open.

    `each_s`: seconds of a micro-batch, by pipeline. The open ones go where they end first.
    """
    paces = [Pace(0.0, seconds) for seconds in each_s]
    return share_out(paces, sum(counts), [(own, sum(counts)) for own in owned(counts, share)])


def is_worth(left: int, each_s: Sequence[float], mine: int) -> bool:
    """Return whether a pipeline should take one of the `left` open micro-batches.

    `each_s`: seconds of a micro-batch, by pipeline. Not where the others would be done with all
    that is left before this one is done with one; the quickest ones always take what there is.
    """
    if left < 1:
        return False
    quickest = min(each_s)
    if each_s[mine] <= _ALIKE * quickest:
        return True
    others = [seconds for number, seconds in enumerate(each_s) if number != mine]
    # Each of the others is in the middle of one.
    without_s = (left + len(others) / 2) / sum(1 / seconds for seconds in others) + min(others)
    return (1 + _BEHIND) * each_s[mine] <= without_s


class Sharing:
    """Which micro-batches of a step a pipeline does: its own, and open ones where there are.

    In a step come first those that pipelines own, in their order, then the open ones.
    """

    def __init__(
        self, bridge: Bridge, pipeline: int, counts: Counts, *, open_share: float = 0.0
    ) -> None:
        self._bridge, self._pipeline, self._share = bridge, pipeline, open_share
        self._counts = counts
        self._key = ""  # of the counter of this step
        self._each_s = tuple(1 / count for count in counts)  # as planned, until it is measured
        self._recent: deque[list[float]] = deque(maxlen=_STEPS)  # seconds of one, by pipeline

    @property
    def has_open(self) -> bool:
        return self._share > 0

    @property
    def owned(self) -> Counts:
        """Return what each pipeline does of a step in any case."""
        return owned(self._counts, self._share)

    def use(self, counts: Counts) -> None:
        """Share out the next steps by other counts."""
        self._counts = counts

    def place_of(self, micro_batch: int) -> int:
        """Return where in the step the `micro_batch`-th of this pipeline stands."""
        owns = self.owned
        before, mine = sum(owns[: self._pipeline]), owns[self._pipeline]
        return micro_batch + (before if micro_batch < mine else sum(owns) - mine)

    def begin(self, step: int) -> Callable[[], int | None] | None:
        """Begin a step; return what gives the next open micro-batch, counted on from the own ones.

        All ranks are done with the step before. None: there are no open ones.
        """
        if not self.has_open:
            return None
        if self._key and self._bridge.rank == 0:
            self._bridge.store.delete_key(self._key)
        self._key = f"open/{step}"
        return self._take

    def note(self, busy_s: Sequence[float], done: Counts) -> None:
        """Take what ranks computed in a step, for the decisions of the next one."""
        if self.has_open:
            pairs = zip(busy_s, done, strict=True)
            self._recent.append([max(seconds, 1e-9) / count for seconds, count in pairs])
            self._each_s = tuple(map(statistics.median, zip(*self._recent, strict=True)))

    def check(self, done: Iterable[int]) -> Counts:
        """Return what pipelines did. Raises: InternalError when that is not the whole step."""
        counts = tuple(done)
        if sum(counts) != sum(self._counts):
            raise InternalError(
                f"pipelines did {counts} micro-batches of a step that has {sum(self._counts)}"
            )
        return counts

    def _take(self) -> int | None:
        """Raises: PeerError when the counter is gone."""
        owns = self.owned
        count = sum(self._counts) - sum(owns)
        begin_s = time.monotonic()
        try:
            taken = self._bridge.store.add(self._key, 0)
            if not is_worth(count - taken, self._each_s, self._pipeline):
                return None
            number = self._bridge.store.add(self._key, 1) - 1
        except RuntimeError as error:
            raise self._bridge.lost("a micro-batch", begin_s, error) from error
        return owns[self._pipeline] + number if number < count else None
